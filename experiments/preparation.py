"""Plans and preprocessed images of a study's two data sets."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from records import differences, exclusive, write
from study_file import Study

from nnunetv2_hyspark.planning.remembered import file_digest


def preprocessed(number: int) -> Path:
    """Folder of a preprocessed data set, which may not be there yet; raises RuntimeError if there is no such data set
    at all."""
    return Path(os.environ["nnUNet_preprocessed"]) / maybe_convert_to_dataset_name(number)


def data_digest(number: int) -> str:
    """Of a raw data set's ``dataset.json``, which names its cases."""
    return file_digest(Path(os.environ["nnUNet_raw"]) / maybe_convert_to_dataset_name(number) / "dataset.json")


def edit_plans(file: Path, values: dict[str, Any]) -> None:
    """Replaces values of configuration 3d_fullres, or of its network's arguments where they have that name."""
    plans = json.loads(file.read_text(encoding="utf-8"))
    configuration = plans["configurations"]["3d_fullres"]
    architecture = configuration["architecture"]["arch_kwargs"]
    for key, value in values.items():
        (architecture if key in architecture else configuration)[key] = value
    file.write_text(json.dumps(plans, indent=2), encoding="utf-8")


def take_intensities(file: Path, other: Path) -> None:
    """Normalises images of these plans by the intensities of other plans, and stores them in a folder of their own."""
    plans = json.loads(file.read_text(encoding="utf-8"))
    key = "foreground_intensity_properties_per_channel"
    plans[key] = json.loads(other.read_text(encoding="utf-8"))[key]
    plans["configurations"]["3d_fullres"]["data_identifier"] = f"{file.stem}_3d_fullres"
    file.write_text(json.dumps(plans, indent=2), encoding="utf-8")


def make_plans(file: Path, request: dict[str, Any], make: Callable[[], None]) -> None:
    """Makes plans and what belongs to them, unless that is done; an interrupted go is repeated.

    A file beside the plans tells for which request they were made, and whether to the end.

    Args:
        file: the plans.
        request: what is asked for.
        make: does it.

    Raises:
        ValueError: if there are such plans, and not of this request.
    """
    stamp = file.with_suffix(".study")
    request = json.loads(json.dumps(request))
    if file.exists():
        if not stamp.exists():
            raise ValueError(f"{file} was not made by a study; delete it, or give the study other names for its plans.")
        before = json.loads(stamp.read_text(encoding="utf-8"))
        if before["request"] != request:
            raise ValueError(
                f"{file} was made for another study ({differences(before['request'], request)}); delete it, or give "
                f"the study other names for its plans."
            )
        if before["is_complete"]:
            return
    write(stamp, {"request": request, "is_complete": False})
    make()
    write(stamp, {"request": request, "is_complete": True})


def prepare(study: Study, logs: Path) -> None:
    """Plans and preprocesses both data sets, unless that is done; one process at a time.

    Raises:
        RuntimeError: if there are no such data sets, or planning fails.
        FileNotFoundError: if the labelled one has no splits.
        ValueError: if there are plans of these names for something else, or fewer folds than the study has.
    """
    folders = {number: preprocessed(number) for number in (study.pile, study.labelled)}
    file = folders[study.labelled] / "splits_final.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist; make the data sets with experiments/make_datasets.py.")
    splits = json.loads(file.read_text(encoding="utf-8"))
    if missing := [str(fold) for fold in study.folds if fold >= len(splits)]:
        raise ValueError(
            f"study {study.name} has fold(s) {', '.join(missing)}, but {file} has {len(splits)}, counted from 0; leave "
            f"them out of the study's `folds`."
        )
    with exclusive(Path(os.environ["nnUNet_preprocessed"]) / f".study_{study.pile}_{study.labelled}.lock"):
        for number, folder in folders.items():
            _plan(study, number, folder / f"{study.plans}.json", logs)
        for name in study.other_plans:
            _plan_further(study, name, folders, logs)


def _plan(study: Study, number: int, file: Path, logs: Path) -> None:
    def make() -> None:
        commands.run(
            logs / f"plan_{number}.txt", "nnUNetv2_plan_and_preprocess", "-d", str(number), "-pl", "HySparKPlanner",
            "-c", "3d_fullres", "-overwrite_plans_name", study.plans, *study.plan, settings=study.architecture,
        )
        edit_plans(file, study.plan_edit)

    request = {
        "plan": study.plan, "architecture": study.architecture, "plan_edit": study.plan_edit,
        "dataset.json": data_digest(number),
    }
    make_plans(file, request, make)


def _plan_further(study: Study, name: str, folders: dict[int, Path], logs: Path) -> None:
    plan = study.other_plans[name]
    number, other = study.labelled, study.pile
    if plan.get("of") == "pile":
        number, other = other, number
    file = folders[number] / f"{name}.json"
    architecture = {**study.architecture, **plan.get("architecture", {})}

    def make() -> None:
        commands.run(
            logs / f"plan_{name}.txt", "nnUNetv2_plan_experiment", "-d", str(number), *plan["arguments"],
            "-overwrite_plans_name", name, settings=architecture,
        )
        edit_plans(file, plan["edit"])
        if plan.get("like_the_other"):
            take_intensities(file, folders[other] / f"{study.plans}.json")
            commands.run(
                logs / f"preprocess_{name}.txt", "nnUNetv2_preprocess", "-d", str(number), "-plans_name", name,
                "-c", "3d_fullres",
            )

    request = {**plan, "architecture": architecture, "dataset.json": data_digest(number)}
    if plan.get("like_the_other"):
        request["the other's plans"] = file_digest(folders[other] / f"{study.plans}.json")
    make_plans(file, request, make)
