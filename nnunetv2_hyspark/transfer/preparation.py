"""Whether images are prepared as those were that a checkpoint was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .description import as_mapping

CT_NORMALIZATION = "CTNormalization"
"""nnU-Net's scheme that clips and scales by the data set's intensities; the others look at each image, or at none."""

LARGEST_RATIO = 1.25
"""Of spacings and of standard deviations, and of a shift of the mean to them: what is below it counts as equal."""


def differences_in_preparation(
    description: Mapping[str, Any], configuration: Mapping[str, Any], plans: Mapping[str, Any]
) -> list[str]:
    """Compares how images were prepared for a checkpoint with a plan, in sentences for the user.

    Args:
        description: the checkpoint's ``"hyspark"`` entry.
        configuration: the plan's configuration, resolved.
        plans: the plan.

    Returns:
        A sentence each for spacing, scheme and, for CT, intensities where they differ by more than a quarter; none
        where the checkpoint does not tell.
    """
    theirs = as_mapping(description.get("configuration"))
    found = []
    spacings = [_numbers(values.get("spacing")) for values in (theirs, configuration)]
    if len(spacings[0]) == len(spacings[1]) and min([*spacings[0], *spacings[1]], default=0) > 0:
        ratios = [max(a / b, b / a) for a, b in zip(*spacings)]
        if max(ratios) > LARGEST_RATIO:
            then, now = (" x ".join(f"{value:g}" for value in spacing) for spacing in spacings)
            found.append(f"voxels had {then} mm in pre-training, they have {now} mm in this plan")
    schemes = [_names(values.get("normalization_schemes")) for values in (theirs, configuration)]
    same_channels = len(schemes[0]) == len(schemes[1])  # else the first convolution is adapted
    if all(schemes) and (schemes[0] != schemes[1] if same_channels else set(schemes[0]) != set(schemes[1])):
        then, now = (", ".join(map(str, names)) for names in schemes)
        found.append(f"images were normalised by {then} in pre-training, by {now} in this plan")
    key = "foreground_intensity_properties_per_channel"
    before, here = (as_mapping(values.get(key)) for values in (description, plans))
    for channel, (first, second) in enumerate(zip(*schemes) if same_channels else ()):
        if first == second == CT_NORMALIZATION:
            differing = difference_in_intensities(before.get(str(channel)), here.get(str(channel)))
            if differing:
                found.append(f"channel {channel}: {differing}")
    return found


def difference_in_intensities(before: Any, now: Any) -> str:
    """In words, what CT normalization does with two data sets' intensities; empty where it is about the same, or one
    does not tell.

    Args:
        before, now: nnU-Net's ``mean``, ``std``, ``percentile_00_5``, ``percentile_99_5``, in HU.
    """
    keys = ("mean", "std", "percentile_00_5", "percentile_99_5")
    values = [_numbers([as_mapping(properties).get(key) for key in keys]) for properties in (before, now)]
    if not all(values):
        return ""
    (mean, std, *_), (mean_now, std_now, *_) = values
    if min(std, std_now) <= 0:
        return ""
    ratio = max(std / std_now, std_now / std)
    if ratio <= LARGEST_RATIO and abs(mean - mean_now) <= (LARGEST_RATIO - 1) * min(std, std_now):
        return ""
    then, here = (f"clipped to {low:.0f} to {high:.0f} HU, mean {m:.0f}, scale {s:.0f}" for m, s, low, high in values)
    return f"CT intensities were {then} in pre-training, and are {here} in this plan"


def _names(values: Any) -> list[str]:
    return [str(value) for value in values] if isinstance(values, (list, tuple)) else []


def _numbers(values: Any) -> list[float]:
    """As floats; empty if there is none, or anything else among them."""
    try:
        found = [float(value) for value in values or ()]
    except (TypeError, ValueError):
        return []
    return found if all(math.isfinite(value) for value in found) else []
