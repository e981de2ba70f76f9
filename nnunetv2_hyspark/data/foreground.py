"""Foreground masks: where the body is, found by rule and never from an annotation."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

BODY_THRESHOLD_HU = -300.0
WORKING_SPACING_MM = 3.0
MIN_WORKING_SIZE = 32
KEPT_COMPONENT_FRACTION = 0.2
# dark class over bright class, medians above the lowest values: air behind a body stays below 0.16 even with a noise of
# a tenth of the signal, MR crops without air lie between 0.37 and 0.49
MAX_AIR_RATIO = 0.27


def foreground_mask(image: sitk.Image, hounsfield: bool) -> sitk.Image:
    """Compute where the body is.

    CT: voxels above -300 HU, opened (drops the table), the largest component, holes in axial slices filled (lungs
    belong to the body). Other modalities: Otsu's threshold, closed, filled; where the dark class is too bright for
    air (a crop inside the body), everything above the smallest value. Components with at least a fifth of the largest
    one's voxels are kept too (two legs). The work is done at about 3 mm and brought back by nearest neighbour.

    Args:
        image: 3D scalar image.
        hounsfield: whether its values are Hounsfield units.

    Returns:
        uint8 image on the grid of ``image``: 1 foreground, 0 background. Never empty: if nothing is found, everything
        above the smallest value is foreground.
    """
    small = _shrink(image)
    mask = _body(small) if hounsfield else _bright(small)
    result = sitk.GetImageFromArray(mask.astype(np.uint8))
    result.CopyInformation(small)
    full = sitk.Resample(result, image, sitk.Transform(), sitk.sitkNearestNeighbor, 0.0, sitk.sitkUInt8, True)
    if not sitk.GetArrayViewFromImage(full).any():
        values = sitk.GetArrayViewFromImage(image)
        full = sitk.GetImageFromArray((values > values.min()).astype(np.uint8))
    # resampling and NIfTI round the geometry, nnU-Net compares it with the image's
    full.CopyInformation(image)
    return full


def _shrink(image: sitk.Image) -> sitk.Image:
    factors = [
        max(1, min(int(WORKING_SPACING_MM / spacing), size // MIN_WORKING_SIZE))
        for spacing, size in zip(image.GetSpacing(), image.GetSize())
    ]
    return image if max(factors) == 1 else sitk.BinShrink(image, factors)


def _body(image: sitk.Image) -> np.ndarray:
    tissue = sitk.GetArrayViewFromImage(image) > BODY_THRESHOLD_HU
    opened = ndimage.binary_opening(tissue, iterations=1)
    mask = _large_components(opened if opened.any() else tissue)
    axis = _axial_axis(image)
    return np.stack([ndimage.binary_fill_holes(plane) for plane in np.moveaxis(mask, axis, 0)], axis=axis)


def _bright(image: sitk.Image) -> np.ndarray:
    values = sitk.GetArrayFromImage(image).astype(np.float32)
    low, high = np.percentile(values, (0.5, 99.0))
    if high <= low:
        low, high = float(values.min()), float(values.max())
    # a few hot voxels (vessels, tracer) would otherwise draw the threshold into the body
    clipped = sitk.GetImageFromArray(np.clip(values, low, high))
    bright = sitk.GetArrayFromImage(sitk.OtsuThreshold(clipped, 0, 1)).astype(bool)
    dark, light = (float(np.median(values[side]) - low) if side.any() else 0.0 for side in (~bright, bright))
    if dark > MAX_AIR_RATIO * light:
        return values > values.min()
    mask = _large_components(bright)
    padded = np.pad(mask, 2)
    closed = ndimage.binary_closing(padded, iterations=2)[2:-2, 2:-2, 2:-2]
    for axis in range(3):
        closed = np.stack([ndimage.binary_fill_holes(plane) for plane in np.moveaxis(closed, axis, 0)], axis=axis)
    return closed


def _large_components(mask: np.ndarray) -> np.ndarray:
    labels, count = ndimage.label(mask)
    if count <= 1:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= KEPT_COMPONENT_FRACTION * sizes.max())[labels] & mask


def _axial_axis(image: sitk.Image) -> int:
    """Array axis (slowest first) that runs most along the body's head-foot direction."""
    direction = np.abs(np.array(image.GetDirection()).reshape(3, 3))
    return 2 - int(np.argmax(direction[2]))
