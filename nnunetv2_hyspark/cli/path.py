"""`hyspark path`: the folder for nnU-Net's variable nnUNet_extTrainer."""
from __future__ import annotations

import argparse
from pathlib import Path

import nnunetv2_hyspark


def external_trainers_folder() -> Path:
    """The folder that holds the stub which re-exports our trainers, and nothing else."""
    return Path(nnunetv2_hyspark.__file__).parent / "external_trainers"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `hyspark path`."""
    parser = subparsers.add_parser(
        "path",
        help="print the folder for nnUNet_extTrainer, where nnU-Net does not find the trainers by itself",
        description="Prints a folder for nnU-Net 2.8 or newer: export nnUNet_extTrainer=$(hyspark path). "
        "Needed only where the package's start-up hook cannot run, as `hyspark doctor` will say. "
        "It covers the trainers, but not the planner.",
    )
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> None:
    """Print the folder."""
    print(external_trainers_folder())
