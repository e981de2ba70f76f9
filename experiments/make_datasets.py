"""Makes the two nnU-Net data sets of a study: a pile without labels, and a labelled one whose folds are its subsets.

    python experiments/make_datasets.py --source FOLDER --pile 930 --labelled 931 --name Hippocampus --modality MR \\
        --labels anterior posterior

FOLDER holds ``images/ID.nii.gz``, ``labels/ID.nii.gz`` and ``splits.json``: ``pretrain``, ``train_labelled`` and
``val`` (lists of ids) and ``few_label_subsets`` (name to list of ids of ``train_labelled``). Fold K of the labelled
data set trains on the K-th subset, smallest first, the last fold on all of ``train_labelled``; every fold is validated
on ``val``. Nothing is copied: nnU-Net reads the files in place. ``nnUNet_raw`` and ``nnUNet_preprocessed`` say where
to.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def subsets_of(splits: dict[str, Any]) -> dict[str, list[str]]:
    """Labelled training cases per number of them, smallest subset first, all of them last."""
    subsets = {len(ids): list(ids) for ids in splits.get("few_label_subsets", {}).values()}
    subsets[len(splits["train_labelled"])] = list(splits["train_labelled"])
    return {str(count): subsets[count] for count in sorted(subsets)}


def write_labelled(folder: Path, source: Path, splits: dict[str, Any], channel: str, labels: list[str]) -> None:
    """``dataset.json`` with a table of where images and labels are."""
    cases = [*splits["train_labelled"], *splits["val"]]
    table = {
        case: {
            "images": [str(source / "images" / f"{case}.nii.gz")], "label": str(source / "labels" / f"{case}.nii.gz")
        }
        for case in cases
    }
    folder.mkdir(parents=True, exist_ok=True)
    description = {
        "channel_names": {"0": channel},
        "labels": {"background": 0, **{name: value for value, name in enumerate(labels, 1)}},
        "numTraining": len(table),
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIO",
        "dataset": table,
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2), encoding="utf-8")


def main() -> None:
    """Makes both, with ``hyspark prepare`` for the pile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--pile", type=int, required=True, help="number of the data set without labels")
    parser.add_argument("--labelled", type=int, required=True, help="number of the labelled data set")
    parser.add_argument("--name", required=True)
    parser.add_argument("--modality", default="CT", help="CT, MR, ...")
    parser.add_argument("--labels", nargs="+", required=True, help="names of labels 1, 2, ...")
    arguments = parser.parse_args()
    splits = json.loads((arguments.source / "splits.json").read_text(encoding="utf-8"))
    raw, preprocessed = Path(os.environ["nnUNet_raw"]), Path(os.environ["nnUNet_preprocessed"])
    labelled = f"Dataset{arguments.labelled:03d}_{arguments.name}"

    raw.mkdir(parents=True, exist_ok=True)
    listing = raw / f"{arguments.name}_pretrain.json"
    images = [str(arguments.source / "images" / f"{case}.nii.gz") for case in splits["pretrain"]]
    listing.write_text(json.dumps(images), encoding="utf-8")
    subprocess.run(
        [
            str(Path(sys.executable).parent / "hyspark"), "prepare", "-d", str(arguments.pile),
            "-n", f"{arguments.name}Pile", "--from", str(listing), "--modality", arguments.modality,
        ],
        check=True,
    )
    write_labelled(raw / labelled, arguments.source, splits, arguments.modality, arguments.labels)
    folds = [{"train": ids, "val": list(splits["val"])} for ids in subsets_of(splits).values()]
    (preprocessed / labelled).mkdir(parents=True, exist_ok=True)
    (preprocessed / labelled / "splits_final.json").write_text(json.dumps(folds, indent=2), encoding="utf-8")
    for fold, count in enumerate(subsets_of(splits)):
        print(f"fold {fold}: {count} labelled cases, validated on {len(splits['val'])}")


if __name__ == "__main__":
    main()
