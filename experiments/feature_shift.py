"""How far the features of visible voxels move when the rest of an image is hidden.

    python experiments/feature_shift.py --images IMAGE [IMAGE ...] --checkpoints NAME=FILE [NAME=FILE ...]

For every pre-training checkpoint, and for the first one's network with fresh weights: the mean squared difference
between the features of a masked image and of the whole one, at visible voxels, as a share of the variance of the whole
image's features there (mean over channels and images), for every scale. Both fillings of hidden neighbours are tried
with every checkpoint, whichever it was trained with. Results go to experiments/results/feature_shift.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from nnunetv2_hyspark.masking import random_visible
from nnunetv2_hyspark.networks.encoder import HybridEncoder
from nnunetv2_hyspark.pretext.build import build_hyspark
from nnunetv2_hyspark.sparse import BlockLayout
from nnunetv2_hyspark.training.whole_image import PretrainedModel, load_pretrained_model, prepare_image

RATIOS = (0.25, 0.75)
FILLINGS = ("zero", "nearest")


def central_crops(model: PretrainedModel, images: list[Path]) -> torch.Tensor:
    """The middle of every image as the plan prepares it, ``(B, C, D, H, W)``; padded with zeros where it is smaller."""
    crops = []
    for file in images:
        data = torch.from_numpy(prepare_image(model, [file]).data)
        for axis, size in enumerate(model.patch_size, start=1):
            excess = data.shape[axis] - size
            if excess > 0:
                data = data.narrow(axis, excess // 2, size)
            elif excess < 0:
                pad = torch.zeros([-excess if i == axis else n for i, n in enumerate(data.shape)])
                data = torch.cat([data, pad], axis)
        crops.append(data)
    return torch.stack(crops)


@torch.no_grad()
def shifts(encoder: HybridEncoder, images: torch.Tensor, ratio: float, filling: str) -> list[float]:
    """Per scale, finest first, the squared change of visible features over their variance."""
    generator = torch.Generator().manual_seed(0)
    visible = random_visible(len(images), encoder.grid(images.shape[2:]), ratio, generator)
    layout = BlockLayout(visible, filling)
    shares = []
    for masked, whole in zip(encoder(layout.gather(images), layout), encoder(images)):
        there = layout.gather(whole)
        spread = (there - there.mean((0, 2, 3, 4), keepdim=True)).square().mean()
        shares.append(float((masked - there).square().mean() / spread))
    return shares


def rows(name: str, encoder: HybridEncoder, images: torch.Tensor) -> list[dict[str, Any]]:
    """Every mask ratio and filling with one encoder."""
    return [
        {"network": name, "ratio": ratio, "filling": filling, "shares": shifts(encoder, images, ratio, filling)}
        for ratio in RATIOS for filling in FILLINGS
    ]


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, nargs="+", required=True)
    parser.add_argument("--checkpoints", nargs="+", required=True, metavar="NAME=FILE")
    options = parser.parse_args()
    named = dict(text.split("=", 1) for text in options.checkpoints)
    found: list[dict[str, Any]] = []
    for name, file in named.items():
        model = load_pretrained_model(file, torch.device("cpu"))
        images = central_crops(model, options.images)
        if not found:
            torch.manual_seed(0)
            kwargs = model.configuration.network_arch_init_kwargs
            found += rows("fresh weights", build_hyspark(images.shape[1], kwargs, model.options).encoder.eval(), images)
        found += rows(name, model.network.encoder, images)
    file = Path(__file__).parent / "results" / "feature_shift.json"
    file.write_text(json.dumps({"images": len(options.images), "rows": found}, indent=1), encoding="utf-8")
    for row in found:
        shares = ", ".join(f"{share:.3f}" for share in row["shares"])
        print(f"{row['network']}: {row['ratio']:.0%} hidden, {row['filling']}: {shares}")


if __name__ == "__main__":
    main()
