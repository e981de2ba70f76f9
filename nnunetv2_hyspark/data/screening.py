"""Which volumes are fit for pre-training, and what their values say about the modality."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum

import numpy as np
import SimpleITK as sitk

MAX_SAMPLES = 200_000
MIN_DISTINCT_VALUES = 8


class Reason(str, Enum):
    """Why a scan is not taken; the value is the heading of the summary table."""

    UNREADABLE = "unreadable"
    NOT_3D = "2D"
    FEW_SLICES = "too few slices"
    CHANNELS = "wrong number of channels"
    GRID = "channels on different grids"
    CONSTANT = "constant"
    NAN = "NaN or infinite"
    LABEL = "label, not a scan"
    NOT_A_SCAN = "DICOM without readable image"
    SLICES_MISSING = "slices missing or uneven"
    DUPLICATE = "duplicate"
    EXCLUDED = "excluded"


@dataclass(frozen=True)
class Rejection:
    """A scan that is not taken: ``reason`` for the table, ``detail`` in one sentence for the report."""

    reason: Reason
    detail: str


def reject(volumes: list[sitk.Image], min_slices: int, max_channels: int) -> Rejection | None:
    """Test the channels of one case and name the first thing that is wrong.

    Args:
        volumes: one scalar image per channel, 2D or 3D, in file order.
        min_slices: fewest voxels that the shortest axis may have.
        max_channels: more than these are a time series.

    Returns:
        None for a usable case, else the reason.
    """
    if len(volumes) > max_channels:
        return Rejection(Reason.CHANNELS, f"{len(volumes)} volumes in one scan, at most {max_channels} are channels")
    first = volumes[0]
    for number, volume in enumerate(volumes):
        size = volume.GetSize()
        where = f"channel {number}: " if len(volumes) > 1 else ""
        if volume.GetDimension() != 3 or min(size) == 1:
            return Rejection(Reason.NOT_3D, f"{where}size {_times(size)}, a volume has more than one slice")
        if min(size) < min_slices:
            return Rejection(Reason.FEW_SLICES, f"{where}size {_times(size)}, fewer than {min_slices} slices")
        spacing = volume.GetSpacing()
        if not all(np.isfinite(s) and s > 0 for s in spacing):
            return Rejection(Reason.UNREADABLE, f"{where}spacing {spacing} mm is not a positive length")
        if size != first.GetSize() or not np.allclose(spacing, first.GetSpacing()):
            return Rejection(
                Reason.GRID,
                f"channel {number} has {_times(size)} voxels of {_times(spacing)} mm, "
                f"channel 0 has {_times(first.GetSize())} of {_times(first.GetSpacing())} mm",
            )
        rejection = _reject_values(sitk.GetArrayViewFromImage(volume), where)
        if rejection is not None:
            return rejection
    return None


def _reject_values(values: np.ndarray, where: str) -> Rejection | None:
    if np.iscomplexobj(values):
        return Rejection(Reason.UNREADABLE, f"{where}complex values, expected real ones")
    # nnU-Net computes in float32, where a large float64 becomes infinite
    low, high = np.float32(values.min()), np.float32(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        return Rejection(Reason.NAN, f"{where}holds NaN or infinite values")
    if low == high:
        return Rejection(Reason.CONSTANT, f"{where}every voxel is {low:g}")
    distinct = np.unique(sample(values))
    if len(distinct) < MIN_DISTINCT_VALUES:
        return Rejection(Reason.LABEL, f"{where}only {len(distinct)} different values, as a label map has")
    return None


def sample(values: np.ndarray) -> np.ndarray:
    """Return at most about 200,000 values spread evenly over an array of any shape, as a vector."""
    step = max(1, int(np.ceil((values.size / MAX_SAMPLES) ** (1 / values.ndim))))
    return np.asarray(values[(slice(None, None, step),) * values.ndim]).ravel()


def looks_like_hounsfield(values: np.ndarray) -> bool:
    """Say whether values of any shape have the range of a CT in Hounsfield units.

    Air or lung (below -500 HU) must be present, nothing may lie outside what scanners write (-4096 to 32767), and at
    least 5 % of the voxels must be soft tissue or fat (-200 to 300 HU).
    """
    picked = sample(values)
    low, high = float(picked.min()), float(picked.max())
    if not (-4096 <= low <= -500 and 100 <= high <= 32767):
        return False
    return float(np.mean((picked >= -200) & (picked <= 300))) >= 0.05


def content_key(volumes: list[sitk.Image]) -> str:
    """Hash the voxel values of all channels, brought to one axis order and direction (LPS).

    Equal for the same scan in another file format, data type or storage orientation; names, headers and compression do
    not matter.
    """
    digest = hashlib.blake2b(digest_size=16)
    for volume in volumes:
        # a view does not keep its image alive
        oriented = sitk.DICOMOrient(volume, "LPS")
        values = sitk.GetArrayViewFromImage(oriented)
        digest.update(str(values.shape).encode())
        for plane in values:
            # adding zero turns -0.0 into 0.0
            digest.update(np.ascontiguousarray(plane, dtype=np.float32) + np.float32(0))
    return digest.hexdigest()


def _times(numbers: tuple[float, ...]) -> str:
    return " x ".join(f"{n:g}" for n in numbers)
