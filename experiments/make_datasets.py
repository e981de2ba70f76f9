"""Makes the two nnU-Net data sets of a study: a pile without labels, and a labelled one whose folds are its subsets.

    python experiments/make_datasets.py --source FOLDER --pile 930 --labelled 931 --name Hippocampus --modality MR \\
        --labels anterior posterior
    python experiments/make_datasets.py --dataset 9 --pile 970 --labelled 971

FOLDER holds ``images/ID.nii.gz``, ``labels/ID.nii.gz`` and ``splits.json``: ``pretrain``, ``train_labelled`` and
``val`` (lists of ids) and ``few_label_subsets`` (name to list of ids of ``train_labelled``). ``--dataset`` is a
labelled data set in ``nnUNet_raw``, of any number of channels; ``--splits`` names such a file for it, else a fifth of
its cases is drawn for ``val``, the rest is ``pretrain`` and ``train_labelled``, and 5, 10 and 20 % of that are the
subsets.

Fold K of the labelled data set trains on the K-th subset, smallest first, the last fold on all of ``train_labelled``;
every fold is validated on ``val``. Nothing is copied: nnU-Net reads the files in place. ``nnUNet_raw`` and
``nnUNet_preprocessed`` say where to.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets


@dataclass(frozen=True)
class Source:
    """Images and labels that a study is made of.

    Attributes:
        name: of both data sets.
        images: files per case, one per channel.
        labels: file per labelled case.
        description: ``channel_names``, ``labels``, ``file_ending`` and what else ``dataset.json`` needs.
        modality: for ``hyspark prepare``.
        splits: see above.
    """

    name: str
    images: dict[str, list[str]]
    labels: dict[str, str]
    description: dict[str, Any]
    modality: str
    splits: dict[str, Any]


def check_splits(splits: dict[str, Any], file: Path | None) -> None:
    """Raises ValueError if a case to be validated on is trained or pre-trained on, or a subset has other cases than
    ``train_labelled``."""
    subsets = {case for ids in splits.get("few_label_subsets", {}).values() for case in ids}
    held_out = set(splits["val"])
    wrong = {
        "has subsets that are not part of train_labelled": subsets - set(splits["train_labelled"]),
        "names cases in val and in train_labelled": held_out & set(splits["train_labelled"]),
        "names cases in val and in pretrain": held_out & set(splits["pretrain"]),
    }
    for what, cases in wrong.items():
        if cases:
            raise ValueError(
                f"{file} {what}, {min(cases)} among them; expected subsets of train_labelled, and in val other cases "
                f"than in train_labelled and pretrain."
            )


def read_folder(folder: Path, name: str, modality: str, labels: list[str]) -> Source:
    """A folder as described above; raises ValueError for splits that share cases."""
    folder = folder.absolute()
    splits = json.loads((folder / "splits.json").read_text(encoding="utf-8"))
    check_splits(splits, folder / "splits.json")
    cases = {*splits["pretrain"], *splits["train_labelled"], *splits["val"]}
    description = {
        "channel_names": {"0": modality},
        "labels": {"background": 0, **{label: value for value, label in enumerate(labels, 1)}},
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIO",
    }
    return Source(
        name, {case: [str(folder / "images" / f"{case}.nii.gz")] for case in cases},
        {case: str(folder / "labels" / f"{case}.nii.gz") for case in cases}, description, modality, splits,
    )


def read_nnunet(number: int, splits: Path | None, modality: str) -> Source:
    """A labelled data set of nnU-Net.

    Raises:
        ValueError: if the splits name cases that it does not have, or share cases.
    """
    name = maybe_convert_to_dataset_name(number)
    folder = Path(os.environ["nnUNet_raw"]) / name
    description = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    table = get_filenames_of_train_images_and_targets(str(folder), description)
    chosen = json.loads(splits.read_text(encoding="utf-8")) if splits else draw_splits(sorted(table))
    check_splits(chosen, splits)
    unknown = sorted({*chosen["pretrain"], *chosen["train_labelled"], *chosen["val"]} - set(table))
    if unknown:
        raise ValueError(
            f"{splits} names {len(unknown)} case(s) that {name} does not have, {unknown[0]} among them; expected the "
            f"names of its files without channel and ending, such as {min(table)}."
        )
    names = description["channel_names"]
    return Source(
        name.partition("_")[2],
        {case: [str(Path(file).absolute()) for file in entry["images"]] for case, entry in table.items()},
        {case: str(Path(entry["label"]).absolute()) for case, entry in table.items()},
        {key: value for key, value in description.items() if key != "dataset"},
        modality or ",".join(names[key] for key in sorted(names, key=int)), chosen,
    )


def draw_splits(cases: list[str], seed: int = 0) -> dict[str, Any]:
    """A fifth of the cases for validation, the others for training, and nested subsets of 5, 10 and 20 % of these."""
    shuffled = random.Random(seed).sample(cases, len(cases))
    held_out = max(1, len(cases) // 5)
    training = shuffled[held_out:]
    subsets = {f"{percent} %": training[:max(1, round(len(training) * percent / 100))] for percent in (5, 10, 20)}
    return {
        "pretrain": sorted(training), "train_labelled": sorted(training), "val": sorted(shuffled[:held_out]),
        "few_label_subsets": subsets,
    }


def subsets_of(splits: dict[str, Any]) -> list[list[str]]:
    """Labelled training cases of every subset, smallest first, all of them last; equal ones once."""
    every = list(splits["train_labelled"])
    different = {frozenset(every): every}
    for ids in splits.get("few_label_subsets", {}).values():
        different.setdefault(frozenset(ids), list(ids))
    return [*sorted((ids for ids in different.values() if ids is not every), key=len), every]


def write_labelled(folder: Path, source: Source) -> None:
    """``dataset.json`` with a table of where images and labels are."""
    cases = [*source.splits["train_labelled"], *source.splits["val"]]
    table = {case: {"images": source.images[case], "label": source.labels[case]} for case in cases}
    folder.mkdir(parents=True, exist_ok=True)
    description = {**source.description, "numTraining": len(table), "dataset": table}
    (folder / "dataset.json").write_text(json.dumps(description, indent=2), encoding="utf-8")


def main() -> None:
    """Makes both, with ``hyspark prepare`` for the pile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--source", type=Path, help="a folder")
    given.add_argument("--dataset", type=int, help="number of a labelled data set in nnUNet_raw")
    parser.add_argument("--splits", type=Path, help="for --dataset")
    parser.add_argument("--pile", type=int, required=True, help="number of the data set without labels")
    parser.add_argument("--labelled", type=int, required=True, help="number of the labelled data set")
    parser.add_argument("--name", help="for --source")
    parser.add_argument("--modality", help="CT, MR, ..., PET,CT; default: CT, or for --dataset its channels' names")
    parser.add_argument("--labels", nargs="+", help="for --source: names of labels 1, 2, ...")
    arguments = parser.parse_args()
    if arguments.source and not (arguments.name and arguments.labels):
        parser.error("--source needs --name and --labels.")
    try:
        if arguments.source:
            source = read_folder(arguments.source, arguments.name, arguments.modality or "CT", arguments.labels)
        else:
            source = read_nnunet(arguments.dataset, arguments.splits, arguments.modality or "")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    raw, preprocessed = Path(os.environ["nnUNet_raw"]), Path(os.environ["nnUNet_preprocessed"])
    labelled = f"Dataset{arguments.labelled:03d}_{source.name}"

    raw.mkdir(parents=True, exist_ok=True)
    listing = raw / f"Dataset{arguments.pile:03d}_{source.name}Pile_pretrain.json"
    images = [{"id": case, "images": source.images[case]} for case in source.splits["pretrain"]]
    listing.write_text(json.dumps(images), encoding="utf-8")
    subprocess.run(
        [
            str(Path(sys.executable).parent / "hyspark"), "prepare", "-d", str(arguments.pile),
            "-n", f"{source.name}Pile", "--from", str(listing), "--modality", source.modality,
        ],
        check=True,
    )
    write_labelled(raw / labelled, source)
    subsets = subsets_of(source.splits)
    folds = [{"train": ids, "val": list(source.splits["val"])} for ids in subsets]
    (preprocessed / labelled).mkdir(parents=True, exist_ok=True)
    (preprocessed / labelled / "splits_final.json").write_text(json.dumps(folds, indent=2), encoding="utf-8")
    for fold, ids in enumerate(subsets):
        print(f"fold {fold}: {len(ids)} labelled cases, validated on {len(source.splits['val'])}")


if __name__ == "__main__":
    main()
