"""`hyspark prepare`: a pile of unlabelled scans becomes an nnU-Net data set."""

from __future__ import annotations

import argparse
import os

EPILOG = """\
sources (--from, any number and mix):
  a folder            NIfTI, NRRD, MHA and DICOM series in it, at any depth; labels are recognised by name and left out
  a file              one scan
  a list              CSV, TSV, TXT or JSON with image paths: one column per channel, optional columns id and modality
  a number or name    an nnU-Net raw data set (imagesTr and imagesTs), labelled or not; ./4 is a folder called 4

NAME_0000, NAME_0001, ... in one folder are the channels of one case. Images stay where they are; DICOM series and files
that nnU-Net could not read are converted once. Run the same command again to continue after an interruption, or to add
new scans.

example:
  hyspark prepare -d 900 -n CTPile --from /data/ct --from 4 --from list.csv
  nnUNetv2_plan_and_preprocess -d 900 -pl HySparKPlanner -c 3d_fullres --verify_dataset_integrity
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `hyspark prepare`."""
    parser = subparsers.add_parser(
        "prepare",
        help="make an nnU-Net data set from unlabelled scans",
        description="Makes an nnU-Net raw data set for pre-training from unlabelled scans.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-d", "--dataset-id", type=int, required=True, metavar="ID", help="a free id, 1 to 999")
    parser.add_argument("-n", "--name", required=True, help="the name after DatasetNNN_")
    parser.add_argument(
        "--from", dest="sources", action="append", nargs="+", required=True, metavar="SOURCE", help="see below"
    )
    parser.add_argument(
        "--modality",
        help="CT, MR, PET, ... or mixed (normalised per case); PET,CT for two channels (default: guessed, and printed)",
    )
    parser.add_argument(
        "--channels", type=int, metavar="N", help="take cases with N channels (default: what most cases have)"
    )
    parser.add_argument("--split-channels", action="store_true", help="make every channel a case of its own")
    parser.add_argument(
        "--no-test-images", action="store_true", help="leave out the imagesTs of nnU-Net data sets (default: taken too)"
    )
    parser.add_argument(
        "--exclude",
        action="append",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="leave out scans whose path or name matches, as in '*_val_*'",
    )
    parser.add_argument(
        "--min-slices", type=int, default=8, metavar="N", help="fewest voxels along the shortest axis (default: 8)"
    )
    parser.add_argument(
        "-np", "--num-processes", type=int, metavar="N", help="worker processes (default: the CPUs, at most 8)"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="start anew where hyspark prepare made a data set of this id and name from other sources",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prepare the data set and print what to do next."""
    from nnunetv2_hyspark.data.prepare import Settings, prepare

    name = options.name
    prefix = f"Dataset{options.dataset_id:03d}_"
    settings = Settings(
        dataset_id=options.dataset_id,
        name=name.removeprefix(prefix),
        sources=tuple(source for group in options.sources for source in group),
        modality=options.modality,
        channels=options.channels,
        split_channels=options.split_channels,
        test_images=not options.no_test_images,
        exclude=tuple(pattern for group in options.exclude for pattern in group),
        min_slices=options.min_slices,
        processes=options.num_processes or _default_processes(),
        overwrite=options.overwrite,
    )
    folder = prepare(settings)
    print(f"\n{folder}")
    print(
        f"Next: nnUNetv2_plan_and_preprocess -d {options.dataset_id} -pl HySparKPlanner -c 3d_fullres "
        "--verify_dataset_integrity"
    )


def _default_processes() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, available)
