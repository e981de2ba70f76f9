"""`hyspark reconstruct`: what a pre-trained network makes of an image it sees only in part."""
from __future__ import annotations

import argparse
from pathlib import Path

PICTURE = (".png",)
VOLUME = (".nii.gz", ".nii")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `hyspark reconstruct`."""
    parser = subparsers.add_parser(
        "reconstruct",
        help="hide most of an image and let a pre-trained network reconstruct it",
        description="Preprocesses an image as the plan in the checkpoint says, hides junction cells, reconstructs "
        "them, and writes a picture (.png: original, masked, reconstruction, error in three planes) or a volume "
        "(.nii.gz: on the grid and in the intensities of the image).",
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint of HySparKPretrainTrainer")
    parser.add_argument("image", type=Path, nargs="+", help="any image that nnU-Net reads, one file per channel")
    parser.add_argument("-o", "--out", type=Path, nargs="+", required=True, help=".png and .nii.gz files to write")
    parser.add_argument("--mask-ratio", type=float, help="fraction of cells to hide (default: the checkpoint's)")
    parser.add_argument("--seed", type=int, default=0, help="of the masks (default: 0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Write what was asked for.

    Raises:
        ValueError: for a checkpoint, an image, a mask ratio or an ending that does not fit, and for a missing GPU.
    """
    for path in options.out:
        if not path.name.endswith((*PICTURE, *VOLUME)):
            raise ValueError(
                f"{path} has no ending this command writes; give .png for a picture or .nii.gz for a volume."
            )
    if options.seed < 0:
        raise ValueError(f"--seed is {options.seed}; expected a whole number from 0 on.")

    import torch

    from ..heap import keep_freed_memory
    from ..training.pictures import save_reconstruction_picture
    from ..training.whole_image import (
        load_pretrained_model,
        prepare_image,
        reconstruct_whole,
        to_original_grid,
        write_nifti,
    )
    from .device import pick_device

    device = torch.device(pick_device(options.device))
    if device.type == "cpu":
        keep_freed_memory()
    model = load_pretrained_model(options.checkpoint, device)
    ratio = model.options.mask_ratio if options.mask_ratio is None else options.mask_ratio
    image = prepare_image(model, options.image)
    result = reconstruct_whole(model, image.data, ratio, options.seed, device)
    name = options.image[0].name
    for path in options.out:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name.endswith(PICTURE):
            first, second, third = (float(s) for s in model.configuration.spacing)
            save_reconstruction_picture(
                path, result.image[0], result.visible, result.restored[0], (first, second, third),
                f"{name}: {ratio:.0%} masked, seed {options.seed}, loss {result.loss:.3f}",
            )
        else:
            write_nifti(path, to_original_grid(model, image, result.restored), image.properties)
        print(path)
    print(f"{ratio:.0%} masked, loss {result.loss:.4f}, mean absolute error {result.masked_mae:.4f} on hidden voxels")
