"""Scores of a finished training's validation: Dice and 95th-percentile Hausdorff distance per case and structure."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import binary_erosion, distance_transform_edt


def surface_distances(first: np.ndarray, second: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Distances, mm, of every surface voxel of each mask to the other's surface."""
    surfaces = [mask & ~binary_erosion(mask) for mask in (first, second)]
    return np.concatenate([
        distance_transform_edt(~other, sampling=spacing)[surface]
        for surface, other in (surfaces, surfaces[::-1])
    ])


def hausdorff95(reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...]) -> float | None:
    """95th percentile of the surface distances of both directions together, mm; None where one mask is empty."""
    if not reference.any() or not prediction.any():
        return None
    return float(np.percentile(surface_distances(reference, prediction, spacing), 95))


def logs_of(folder: Path) -> list[Path]:
    """A training's logs, oldest first: nnU-Net names them by their date, without leading zeros."""
    return sorted(folder.glob("training_log_*.txt"), key=lambda log: [int(n) for n in re.findall(r"\d+", log.name)])


def by_epoch(folder: Path, pattern: str) -> list[str]:
    """What a pattern's group finds in a training's logs, epoch by epoch; the last one where an epoch was repeated."""
    found: dict[int, str] = {}
    epoch = 0
    for log in logs_of(folder):
        for line in log.read_text(encoding="utf-8").splitlines():
            if beginning := re.search(r": Epoch (\d+) *$", line):
                epoch = int(beginning.group(1))
            elif match := re.search(pattern, line):
                found[epoch] = match.group(1)
    return [found[epoch] for epoch in sorted(found)]


def learning_curve(folder: Path) -> list[float]:
    """Mean pseudo-Dice of nnU-Net's validation patches after every epoch, from the training logs."""
    lists = (re.findall(r"-?\d+\.\d+|nan", dice) for dice in by_epoch(folder, r"Pseudo dice \[(.*)\]"))
    return [float(np.nanmean([float(number) for number in numbers] or [np.nan])) for numbers in lists]


def validation_losses(folder: Path) -> list[float]:
    """Of every epoch of a pre-training, in order, from its logs."""
    return [float(loss) for loss in by_epoch(folder, r": val_loss (\S+)")]


def probe_dice(folder: Path) -> list[float]:
    """Dice of every linear probe of a pre-training that named a ``probe_dataset``, in order, from its logs."""
    return [float(dice) for dice in by_epoch(folder, r"linear probe: Dice (\d+\.?\d*)")]


def training_seconds(folder: Path) -> float:
    """Time of all epochs, from the training logs: without start-up, and of a repeated epoch the last go."""
    return sum(float(seconds) for seconds in by_epoch(folder, r"Epoch time: (\d+\.?\d*) s"))


def score_validation(folder: Path) -> dict[str, Any]:
    """Per case ``dice``, ``hd95`` and ``voxels`` of the reference by label, the learning curve, and the seconds of
    training.

    Args:
        folder: a training's ``fold_K``, with nnU-Net's ``validation/summary.json`` and predictions.
    """
    summary = json.loads((folder / "validation" / "summary.json").read_text(encoding="utf-8"))
    cases: dict[str, Any] = {}
    for case in summary["metric_per_case"]:
        images = [sitk.ReadImage(case[key]) for key in ("reference_file", "prediction_file")]
        reference, prediction = (sitk.GetArrayFromImage(image) for image in images)
        spacing = images[0].GetSpacing()[::-1]
        name = Path(case["prediction_file"]).name.removesuffix(".nii.gz")
        cases[name] = {
            "dice": {label: metrics["Dice"] for label, metrics in case["metrics"].items()},
            "hd95": {
                label: hausdorff95(reference == int(label), prediction == int(label), spacing)
                for label in case["metrics"]
            },
            "voxels": {label: int(np.count_nonzero(reference == int(label))) for label in case["metrics"]},
        }
    return {"cases": cases, "curve": learning_curve(folder), "seconds": training_seconds(folder)}
