"""Validation of pre-training: how well held-out cases are reconstructed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.cases import image_shape, random_corner, read_crop
from ..geometry import Size3
from ..pretext.hyspark import HySparK
from .pictures import save_reconstruction_picture
from .reconstruction import reconstruct

CROPS_PER_CASE = 4

UNITS = {
    "cell": {
        "loss": "mean squared error on masked cells, in units of each cell's variance",
        "masked_mae": "mean absolute error on masked voxels, preprocessed intensities, each cell's own mean and "
        "deviation restored",
    },
    "intensity": {
        "loss": "mean squared error on masked cells, preprocessed intensities",
        "masked_mae": "mean absolute error on masked voxels, preprocessed intensities",
    },
}
"""What is measured of a case, by the target of the loss."""


def validate_cases(
    network: HySparK,
    cases: Sequence[tuple[str, Path]],
    patch_size: Size3,
    spacing: tuple[float, float, float],
    mask_ratio: float,
    seed: int,
    device: torch.device,
    folder: Path,
    log: Callable[..., None],
    first: int = 0,
    every: int = 1,
    skip_broken: bool = False,
) -> list[dict[str, Any]]:
    """Reconstructs crops of every case, the first from its middle, with fixed masks, and draws the first.

    Args:
        network: in evaluation mode.
        cases: names and preprocessed images.
        patch_size: voxels per axis.
        spacing: mm per voxel, for the pictures.
        mask_ratio: fraction of hidden cells.
        seed: of crops and masks.
        device: where to compute.
        folder: where the pictures go.
        log: takes a line.
        first, every: which of the cases this process does; crops and masks do not depend on it.
        skip_broken: leave out cases that cannot be read, with a warning.

    Returns:
        Per case ``case``, ``loss``, ``masked_mae`` (see :data:`UNITS`) and ``picture``.

    Raises:
        OSError, ValueError: if a case cannot be read.
    """
    results = []
    for index, (name, path) in list(enumerate(cases))[first::every]:
        rng = np.random.default_rng((seed, 2, index))
        try:
            crops = _crops(path, patch_size, rng)
        except (OSError, ValueError) as broken:
            if not skip_broken:
                raise
            log(f"WARNING: {name} is left out: {broken}")
            continue
        parts = [reconstruct(network, crop, mask_ratio, int(rng.integers(2**62)), device) for crop in crops]
        picture = folder / f"{name}.png"
        title = f"{name}: {mask_ratio:.0%} masked, loss {parts[0].loss:.3f}"
        save_reconstruction_picture(
            picture, parts[0].image[0], parts[0].visible, parts[0].restored[0], spacing, title
        )
        loss = float(np.mean([part.loss for part in parts]))
        error = float(np.mean([part.masked_mae for part in parts]))
        results.append({"case": name, "loss": loss, "masked_mae": error, "picture": picture.name})
        log(f"reconstructed {name}: loss {loss:.4f}")
    return results


def _crops(path: Path, patch_size: Size3, rng: np.random.Generator) -> list[np.ndarray]:
    shape = image_shape(path)
    corners = [middle_corner(shape, patch_size)]
    if any(extent > edge for extent, edge in zip(shape, patch_size)):
        corners += [random_corner(shape, patch_size, rng) for _ in range(CROPS_PER_CASE - 1)]
    return [read_crop(path, corner, patch_size) for corner in corners]


def evenly_spread(names: Sequence[str], limit: int) -> list[str]:
    """At most ``limit`` of the names, at equal distances, the first and the last among them; 0: all of them."""
    if not limit or len(names) <= limit:
        return list(names)
    return [names[int(index)] for index in np.linspace(0, len(names) - 1, limit).round()]


def middle_corner(shape: Size3, patch_size: Size3) -> list[int]:
    """First voxel of a box in the middle of an image."""
    return [(extent - edge) // 2 for extent, edge in zip(shape, patch_size)]


def write_summary(
    path: Path, results: Sequence[Mapping[str, Any]], mask_ratio: float, target: str
) -> dict[str, float]:
    """Writes ``summary.json`` and returns the means over cases; none where there is no case.

    Args:
        path: of the file.
        results: of :func:`validate_cases`.
        mask_ratio: fraction of hidden cells.
        target: of the loss, a key of :data:`UNITS`.
    """
    units = UNITS[target]
    means = {key: float(np.mean([r[key] for r in results])) for key in units} if results else {}
    summary = {
        "metric_per_case": sorted(results, key=lambda r: r["case"]),
        "mean": means,
        "mask_ratio": mask_ratio,
        "units": units,
    }
    path.write_text(json.dumps(summary, indent=2))
    return means
