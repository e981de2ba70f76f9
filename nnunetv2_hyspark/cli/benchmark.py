"""`hyspark benchmark`: what the masking saves on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

WHAT = ("encoder", "step", "memory", "ratios", "sweep", "convolutions", "segmentation", "loading")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `hyspark benchmark`."""
    parser = subparsers.add_parser(
        "benchmark",
        help="time pre-training on this machine against dense references",
        description="Times the paper's network, or that of a plan, in one process, variants in turn: 'blocks' (this "
        "library), 'dense' (the same, dense-then-mask), 'official-like' (dense-then-mask as the official release "
        "computes it), and the block path by other backends. Ratios are medians over pairs of the same round. Settings "
        "in nnUNet_hyspark apply.",
    )
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT), help="default: all")
    parser.add_argument("--plans", type=Path, metavar="FILE",
                        help="measure the network, patch size, batch size, channels and settings of this plans file: "
                        "ours, or any of nnU-Net's that HySparKPretrainTrainer takes (default: the paper's network)")
    parser.add_argument("--configuration", metavar="NAME", help="of the plans (default: 3d_fullres)")
    parser.add_argument("--step", choices=("default", "segmentation", "reconstruction", "official"), default="default",
                        help="decoder of the step: default, as the settings or the plan say; segmentation, the "
                        "segmentation network's own; reconstruction, the paper's; official, as in the official "
                        "release (width 768)")
    parser.add_argument("--size", type=int, nargs=3, metavar=("D", "H", "W"),
                        help="crop, voxels (default: 96 96 96, or the plan's patch size)")
    parser.add_argument("--batch", type=int, help="crops per step (default: 1, or the plan's batch size)")
    parser.add_argument("--mask-ratio", type=float, help="default: the settings' or the plan's, else 0.75")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5, 0.75, 0.9], help="for --what ratios")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="EDGE",
                        help="for --what sweep: edges of cubic crops, voxels (default: the crop above)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2], help="for --what sweep (default: 1 2)")
    parser.add_argument("--base-width", type=int,
                        help="channels of the finest stage of the paper's network (default: 32, as in the paper)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("float32", "bf16", "fp16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network of the step")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=300.0, help="start no further round of a table after this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw what was measured here")
    parser.set_defaults(run=run)


def _check(options: argparse.Namespace) -> None:
    """Raises ValueError for options that contradict each other, or a plot that could not be written."""
    if options.plans and options.base_width:
        raise ValueError(
            f"--base-width {options.base_width} is given with --plans, whose network has widths of its own; give one "
            f"of the two."
        )
    if options.configuration and not options.plans:
        raise ValueError(
            f"--configuration {options.configuration} is given without a plans file; add --plans FILE, or leave it out."
        )
    if options.plot and options.plot.suffix != ".png":
        raise ValueError(f"--plot is {options.plot}; expected a file name that ends in .png.")


def run(options: argparse.Namespace) -> None:
    """Measure, print, and write JSON and a plot.

    Raises:
        FileNotFoundError: if the plans file does not exist.
        ValueError: for a plan, a size, a batch or a mask ratio of which no step can be made, and for a missing GPU.
    """
    _check(options)

    import json
    import os
    import shlex
    import sys

    import torch

    from nnunetv2_hyspark.benchmark.plan import read_plan
    from nnunetv2_hyspark.benchmark.plot import save_plot
    from nnunetv2_hyspark.benchmark.request import Request
    from nnunetv2_hyspark.benchmark.run import measure
    from nnunetv2_hyspark.benchmark.sweep import sweep_points
    from nnunetv2_hyspark.cli.device import pick_device
    from nnunetv2_hyspark.configuration import ENVIRONMENT_VARIABLE
    from nnunetv2_hyspark.geometry import as_size3
    from nnunetv2_hyspark.heap import SET_BY_USERS
    from nnunetv2_hyspark.training.settings import resolve_settings

    if options.threads:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    torch.backends.cudnn.benchmark = device == "cuda"  # as nnU-Net trains
    planned = read_plan(options.plans, options.configuration or "3d_fullres") if options.plans else None
    named = {"decoder": "segmentation" if options.step == "segmentation" else "reconstruction"}
    block = {} if options.step == "default" and not planned else {"hyspark": {"pretraining": named}}
    settings = resolve_settings(block, "of the paper's network", "pretraining")
    of_settings = {
        "batch": settings.pretraining.batch_size or 1,
        "mask_ratio": settings.pretraining.mask_ratio,
        "base_width": settings.architecture.base_width,
    }
    given: dict[str, Any] = {
        "size": as_size3(options.size, "--size") if options.size else None,
        "batch": options.batch,
        "mask_ratio": options.mask_ratio,
        "base_width": options.base_width,
    }
    request = Request(
        **{
            **(planned.defaults() if planned else of_settings),
            **{key: value for key, value in given.items() if value is not None},
        },
        step=options.step, device=device, precision=options.precision, compile=options.compile,
        repeats=options.repeats, budget=options.seconds, planned=planned, architecture=settings.architecture,
        settings=settings.pretraining,
    )
    sizes = [as_size3(edge, "--sizes") for edge in options.sizes] if options.sizes else [request.size]
    for file in filter(None, (options.json, options.plot)):
        file.parent.mkdir(parents=True, exist_ok=True)
    network = f"{planned.configuration} of {planned.plans}" if planned else "the paper's network"
    size = "x".join(map(str, request.size))
    print(f"{network}: {size} voxels, {request.channels} channel(s), batch {request.batch}, "
          f"{request.mask_ratio:.0%} masked, on {device}", flush=True)
    points = sweep_points(request, sizes, options.batches)
    results = measure(request, options.what, options.ratios, points, lambda line: print(line, flush=True))
    noted = (*SET_BY_USERS, "GLIBC_TUNABLES", ENVIRONMENT_VARIABLE)
    variables = [f"{name}={shlex.quote(os.environ[name])}" for name in noted if name in os.environ]
    results["command"] = " ".join([*variables, shlex.join(["hyspark", *sys.argv[1:]])])
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")
        print(f"written to {options.json}")
    if options.plot:
        save_plot(results, options.plot)
        print(f"drawn in {options.plot}")
