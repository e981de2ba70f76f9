"""Strides and kernel sizes that give junction cells of about the same size in mm along every axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..geometry import Size3, as_size3, cumulative_strides

MIN_CELLS = 4
"""Junction cells per axis below which an axis is not halved further, nnU-Net's smallest edge of a feature map."""


@dataclass(frozen=True)
class Topology:
    """Per-stage strides and kernel sizes, finest stage first.

    Attributes:
        strides: the first is 1; the others are 1 or 2 per axis.
        kernel_sizes: 1 or 3 per axis.
    """

    strides: tuple[Size3, ...]
    kernel_sizes: tuple[Size3, ...]

    @property
    def total_stride(self) -> Size3:
        """Voxels per junction cell and axis."""
        return cumulative_strides(self.strides)[-1]

    def cell_mm(self, spacing: Sequence[float]) -> tuple[float, float, float]:
        """Edges of a junction cell in mm."""
        first, second, third = (float(s) * t for s, t in zip(spacing, self.total_stride))
        return first, second, third


def plan_topology(spacing: Sequence[float], size: Sequence[float], max_stride: int) -> Topology:
    """The deepest network whose junction cells are about cubic in mm and that leaves enough of them.

    After ``t`` stages an axis has the total stride, a power of two, that brings its voxels closest to ``2 ** t`` times
    the finest spacing; so a cell's edges differ by less than a factor of two between axes, wherever the images are
    large enough. An axis is halved only while :data:`MIN_CELLS` cells are left, and there are as many stages as two of
    the axes allow: a thin axis does not make the network shallow.

    Args:
        spacing: mm per voxel.
        size: voxels of the largest patch that makes sense, at most the median image.
        max_stride: largest total stride, a power of two is reached at most.

    Raises:
        ValueError: if the images are too small to be halved at all.
    """
    limits = [int(math.log2(max(s, 1) / MIN_CELLS)) if s >= 2 * MIN_CELLS else 0 for s in _padded(size)]
    deepest = int(math.log2(max_stride))
    for depth in range(deepest, 0, -1):
        exponents = [_exponents(spacing, depth, axis) for axis in range(3)]
        if sum(exponents[axis][-1] <= limits[axis] for axis in range(3)) >= 2:
            break
    else:
        raise ValueError(
            f"the images have a median size of {'x'.join(str(round(s)) for s in size)} voxels after resampling; "
            f"HySparK needs at least {2 * MIN_CELLS} voxels along two axes, so use a finer spacing or a 2D network."
        )
    for axis in range(3):
        exponents[axis] = [min(e, limits[axis]) for e in exponents[axis]]
    if not any(e[-1] for e in exponents):
        depth, exponents = 1, [[0, min(1, limit)] for limit in limits]
    strides, kernels = [(1, 1, 1)], []
    finest = min(spacing)
    for stage in range(depth):
        strides.append(as_size3(2 ** (e[stage + 1] - e[stage]) for e in exponents))
    for stage in range(depth):
        voxel = [s * 2 ** e[stage] for s, e in zip(spacing, exponents)]
        reference = max(min(voxel), finest)
        kernels.append(as_size3(3 if v / reference < 2 or e[stage] else 1 for v, e in zip(voxel, exponents)))
    kernels.append((3, 3, 3))
    return Topology(tuple(strides), tuple(kernels))


def _padded(size: Sequence[float]) -> list[float]:
    """Edges rounded up to even numbers, since patches are padded: 15 voxels are halved as often as 16."""
    return [2 * math.ceil(s / 2) for s in size]


def _exponents(spacing: Sequence[float], depth: int, axis: int) -> list[int]:
    """log2 of an axis's total stride after 0, 1, ..., ``depth`` stages."""
    offset = math.log2(min(spacing) / spacing[axis])
    return [min(max(math.floor(stage + offset + 0.5), 0), stage) for stage in range(depth + 1)]
