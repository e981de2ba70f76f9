"""`hyspark benchmark`: what the masking saves on this machine."""

from __future__ import annotations

import argparse

WHAT = ("encoder", "step", "memory", "ratios", "segmentation", "loading")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `hyspark benchmark`."""
    parser = subparsers.add_parser(
        "benchmark",
        help="time pre-training on this machine against dense references",
        description="Times the paper's network in one process, variants in turn: 'blocks' (this library), 'dense' (the "
        "same, dense-then-mask), 'official-like' (dense-then-mask as the official release computes it). Ratios are "
        "medians over pairs of the same round.",
    )
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT), help="default: all")
    parser.add_argument("--step", choices=("default", "official"), default="default",
                        help="the step's decoder: default settings, or the official release's (width 768)")
    parser.add_argument("--size", type=int, nargs=3, default=(96, 96, 96), metavar=("D", "H", "W"), help="crop, voxels")
    parser.add_argument("--batch", type=int, default=1, help="crops per step")
    parser.add_argument("--mask-ratio", type=float, default=0.75)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5, 0.75, 0.9], help="for --what ratios")
    parser.add_argument("--base-width", type=int, default=32, help="channels of the finest stage (paper: 32)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("float32", "bf16", "fp16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network of the step")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=300.0, help="start no further round of a table after this")
    parser.add_argument("--json", metavar="FILE", help="write every figure here")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, print, and write JSON."""
    import json
    import shlex
    import sys
    from pathlib import Path

    import torch

    from nnunetv2_hyspark.benchmark.run import Request, measure
    from nnunetv2_hyspark.cli.device import pick_device
    from nnunetv2_hyspark.geometry import as_size3

    if options.threads:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    request = Request(
        as_size3(options.size), options.batch, options.mask_ratio, options.step, options.base_width, device,
        options.precision, options.compile, options.repeats, options.seconds,
    )
    results = measure(request, options.what, options.ratios, lambda line: print(line, flush=True))
    results["command"] = shlex.join(["hyspark", *sys.argv[1:]])
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2), encoding="utf-8")
        print(f"written to {options.json}")
