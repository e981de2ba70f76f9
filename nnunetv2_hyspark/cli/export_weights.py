"""`hyspark export`: a checkpoint of ours in the layout of the official HySparK release."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `hyspark export`."""
    parser = subparsers.add_parser(
        "export",
        help="write a checkpoint in the official layout",
        description="Writes a checkpoint as a state dict of the official HySparK release. An imported file comes back "
        "exactly; a checkpoint of our own needs the official decoder "
        "(decoder=reconstruction,fuse_finest=false,decoder_norm=batch), or --encoder-only.",
    )
    parser.add_argument("checkpoint", help="a checkpoint of ours")
    parser.add_argument("-o", "--output", required=True, help="official file to write")
    parser.add_argument("--encoder-only", action="store_true", help="write an encoder file")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Convert and say what was written."""
    from nnunetv2_hyspark.cli.import_weights import refuse_existing
    from nnunetv2_hyspark.training.checkpoints import save_atomically
    from nnunetv2_hyspark.transfer.exporting import export_official

    refuse_existing(options.output, options.overwrite)
    exported = export_official(options.checkpoint, options.encoder_only)
    save_atomically(exported, options.output)
    tensors = [value for value in exported.values() if hasattr(value, "numel")]
    print(f"wrote {options.output}: {len(tensors)} tensors, {sum(t.numel() for t in tensors):,} values")
