"""`hyspark import`: a file of the official HySparK release becomes a checkpoint of ours."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

EPILOG = """\
example:
  hyspark import hybird_ct_pretrained_timm_style_mask75.pth -o official.pth
  hyspark info official.pth
  nnUNetv2_train 10 3d_fullres 0 -tr HySparKFinetuneTrainer -pretrained_weights official.pth

The plan must have the file's strides; other kernel sizes are adapted. The settings that give the same network are
printed.
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `hyspark import`."""
    parser = subparsers.add_parser(
        "import",
        help="convert a file of the official HySparK release",
        description="Converts a file of the official HySparK release (encoder file, training file or segmentation "
        "network) to a checkpoint for -pretrained_weights. Nothing in the file is executed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", help="the official .pth file")
    parser.add_argument("-o", "--output", required=True, help="checkpoint to write")
    parser.add_argument(
        "--heads",
        type=int,
        metavar="N",
        help="attention heads (default: from the file's position table, as the official release sets them; "
        "without a table, one per 32 channels)",
    )
    parser.add_argument(
        "--strides",
        type=int,
        nargs="+",
        metavar="S",
        help="stride per stage, as in 1 2 2 2 2 (default: from the file's decoder; without one, 2)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write what became of every tensor, as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace existing output files")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Convert, report, and print the settings for a plan."""
    from nnunetv2_hyspark.training.checkpoints import save_atomically
    from nnunetv2_hyspark.transfer.importing import import_official

    if options.json and Path(options.json).resolve() == Path(options.output).resolve():
        raise ValueError(f"-o and --json both name {options.json}; give the report a name of its own.")
    for output in filter(None, (options.output, options.json)):
        refuse_existing(output, options.overwrite)
    imported = import_official(options.file, options.heads, options.strides)
    save_atomically(imported.checkpoint, options.output)
    if options.json:
        imported.report.write_json(options.json)
    print(imported.report.table())
    kwargs = imported.architecture.arch_kwargs
    values = ",".join(f"{key}={json.dumps(value, separators=(',', ':'))}" for key, value in imported.settings.items())
    print(f"\nwrote {options.output}")
    print(
        f"the plan needs strides {kwargs['strides']} in its first stages; kernel sizes other than "
        f"{kwargs['kernel_sizes']} are adapted;"
    )
    print(f"with a plain nnU-Net plan, set: export nnUNet_hyspark='{values}'")


def refuse_existing(output: str, overwrite: bool) -> None:
    """Raises ValueError if the output exists or its folder does not."""
    path = Path(output)
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already; choose another name or add --overwrite.")
    if not path.parent.is_dir():
        raise ValueError(f"the folder {path.parent} does not exist; create it or choose another place.")
