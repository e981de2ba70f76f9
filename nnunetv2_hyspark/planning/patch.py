"""Patch sizes to choose from, largest first, in nnU-Net's order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..geometry import Size3, as_size3
from .topology import MIN_CELLS

INITIAL_VOXELS = 256**3
"""Size of the first patch that is considered, before it is cut to the image; nnU-Net's number."""


def initial_patch(spacing: Sequence[float], median_shape: Sequence[float]) -> list[int]:
    """A patch of the shape of a cube in mm that surely is large enough, cut to the median image; as in nnU-Net.

    Args:
        spacing: mm per voxel.
        median_shape: voxels.
    """
    inverse = 1 / np.asarray(spacing, dtype=float)
    edges = inverse * (INITIAL_VOXELS / np.prod(inverse)) ** (1 / 3)
    return [max(1, min(round(e), int(round(m)))) for e, m in zip(edges, median_shape)]


def patch_candidates(patch: Sequence[int], stride: Sequence[int], median_shape: Sequence[float]) -> list[Size3]:
    """Patches of whole junction cells, from the given one (padded) to the smallest, each one cell thinner in one axis.

    As in nnU-Net the axis is reduced that covers most of the median image. No axis gets below
    :data:`nnunetv2_hyspark.planning.topology.MIN_CELLS` cells unless the first patch has fewer.

    Args:
        patch: voxels, need not be divisible.
        stride: voxels per junction cell.
        median_shape: voxels of the median image.
    """
    step = as_size3(stride, "stride")
    edges = [-(-int(p) // s) * s for p, s in zip(patch, step)]
    least = [min(e, MIN_CELLS * s) for e, s in zip(edges, step)]
    candidates = [as_size3(edges)]
    while True:
        reducible = [axis for axis in range(3) if edges[axis] - step[axis] >= least[axis]]
        if not reducible:
            return candidates
        axis = max(reducible, key=lambda a: edges[a] / median_shape[a])
        edges[axis] -= step[axis]
        candidates.append(as_size3(edges))
