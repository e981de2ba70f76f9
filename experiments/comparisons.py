"""Dice, distances and learning curves of a study's trainings, and how one arm of it compares with another.

A piece is what `records.py` stores of a training: its seed, its learning curve and, per case and structure, Dice
(fraction), HD95 (mm) and the reference's size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

SMOOTHING = 5
"""Epochs that learning curves are averaged over before they are compared."""


def is_scored(case: dict[str, Any], label: str) -> bool:
    """Whether a case's Dice of a structure counts: not where reference and prediction both lack it (NaN or None).

    A structure that the prediction alone has would count 0 for one arm and not at all for another, so it does not count
    where the number of ``voxels`` is known.
    """
    dice = case["dice"].get(label)
    return dice is not None and bool(np.isfinite(dice)) and case.get("voxels", {}).get(label) != 0


def mean_dice(piece: dict[str, Any]) -> dict[str, float]:
    """Per case, the mean over structures that count, percent; cases without any are left out."""
    means = {}
    for name, case in piece["cases"].items():
        dice = [value for label, value in case["dice"].items() if is_scored(case, label)]
        if dice:
            means[name] = 100 * float(np.mean(dice))
    return means


def labels_of(pieces: list[dict[str, Any]]) -> list[str]:
    """Of the structures, in the order of their numbers."""
    return sorted({label for piece in pieces for case in piece["cases"].values() for label in case["dice"]}, key=int)


def by_structure(pieces: list[dict[str, Any]]) -> str:
    """Mean Dice over cases and seeds, percent; "-" where no case has a structure."""
    shown = []
    for label in labels_of(pieces):
        dice = [
            case["dice"][label] for piece in pieces for case in piece["cases"].values() if is_scored(case, label)
        ]
        shown.append(f"{100 * np.mean(dice):.1f}" if dice else "-")
    return ", ".join(shown)


def distances(pieces: list[dict[str, Any]]) -> str:
    """Median HD95, mm, by structure, and how many structures were missed."""
    shown, missed = [], 0
    for label in labels_of(pieces):
        values = []
        for piece in pieces:
            for case in piece["cases"].values():
                value = case["hd95"].get(label)
                if value is not None:
                    values.append(value)
                elif is_scored(case, label):
                    values.append(math.inf)
        missed += sum(map(math.isinf, values))
        median = float(np.median(values)) if values else math.nan
        shown.append(f"{median:.1f}" if math.isfinite(median) else "-")
    return ", ".join(shown) + (f"; {missed} missed" if missed else "")


def dice_by_seed(pieces: list[dict[str, Any]]) -> list[float]:
    """Per training, the mean over its cases, percent."""
    return [float(np.mean(list(mean_dice(piece).values()))) for piece in pieces]


def common_seeds(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> set[int]:
    """Seeds that both arms were trained with."""
    return {piece["seed"] for piece in ours} & {piece["seed"] for piece in theirs}


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Means of both, percent, over the cases and the seeds that both have, and the p value of their paired
    differences."""
    seeds = common_seeds(ours, theirs)
    sides = [case_means([p for p in pieces if p["seed"] in seeds]) for pieces in (ours, theirs)]
    common = sorted(sides[0].keys() & sides[1].keys())
    first, second = (np.array([side[case] for case in common]) for side in sides)
    p = float(wilcoxon(first - second).pvalue) if np.any(first != second) else 1.0
    return float(first.mean()), float(second.mean()), p


def case_means(pieces: list[dict[str, Any]]) -> dict[str, float]:
    """Per case, the mean over seeds."""
    dice = [mean_dice(piece) for piece in pieces]
    return {case: float(np.mean([d[case] for d in dice if case in d])) for case in {c for d in dice for c in d}}


def comparison(name: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]], steps_per_epoch: int) -> str:
    """Difference to a baseline's pieces in words, empty where there is no common seed."""
    seeds = common_seeds(ours, theirs)
    if not seeds:
        return ""
    first, second, p = compare(ours, theirs)
    common = [[piece for piece in pieces if piece["seed"] in seeds] for pieces in (ours, theirs)]
    means = f": {first:.1f}, {second:.1f}" if len(seeds) < max(len(ours), len(theirs)) else ""
    ends = smoothed(curve(common[1]))
    above, itself = (np.nonzero(smoothed(curve(pieces)) >= ends[-1])[0] for pieces in common)
    when = f"after {(above[0] + 1) * steps_per_epoch}" if len(above) else "never"
    return (
        f"{name}: {first - second:+.1f} (p {p:.2g}{means}), level {when}, itself after "
        f"{(itself[0] + 1) * steps_per_epoch} of {len(ends) * steps_per_epoch}"
    )


def smoothed(values: np.ndarray) -> np.ndarray:
    """Every value's mean with those before it, over ``SMOOTHING`` epochs, over fewer at the beginning."""
    return np.array([np.nanmean(values[max(0, end - SMOOTHING):end]) for end in range(1, len(values) + 1)])


def curve(pieces: Iterable[dict[str, Any]]) -> np.ndarray:
    """Pseudo-Dice after every epoch, mean over seeds, percent."""
    curves = [piece["curve"] for piece in pieces]
    length = min(map(len, curves))
    return 100 * np.nanmean([c[:length] for c in curves], axis=0)
