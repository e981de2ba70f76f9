"""Index tables that attach a halo of neighbouring voxels to every visible block.

A block feature map ``(n, C, s0, s1, s2)`` in channels-last memory is a table of ``n * s0 * s1 * s2`` rows of C numbers.
A halo is one gather from that table. Where the neighbour is outside the volume, the row is zero; where it is masked, it
is zero or the nearest voxel of the block itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from ..geometry import Size3


@dataclass(frozen=True)
class HaloTable:
    """Gather table for one block shape and one halo radius.

    Attributes:
        source: int64 ``(n * p0 * p1 * p2,)``, row of the block table for every voxel of the padded blocks,
            ``p = s + 2 * radius``; any row where there is no source.
        empty: int64 ``(m,)``, the padded rows that must be zero.
        padded: edge lengths ``(p0, p1, p2)``.
        symmetric: whether voxels see each other or not at all, as on a masked image: then the halo of a gradient is
            gathered by the same table. Not so where a voxel stands for hidden ones.
    """

    source: torch.Tensor
    empty: torch.Tensor
    padded: Size3
    symmetric: bool = True

    @cached_property
    def neighbours(self) -> torch.Tensor:
        """``source`` as int32, with -1 where there is none: for kernels that look up every voxel by themselves."""
        return self.source.int().index_fill_(0, self.empty, -1)

    @cached_property
    def _pairs(self) -> dict[Size3, list[tuple[torch.Tensor, torch.Tensor]]]:
        return {}

    def pairs(self, kernel: Size3) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Which voxels a kernel of this size, the one the table was made for, joins: for every tap in row-major order
        the rows that it adds to, and the rows that it reads, int64, each row at most once."""
        if kernel not in self._pairs:
            windows = self.neighbours.view(-1, *self.padded)
            for axis, edge in enumerate(kernel):
                windows = windows.unfold(axis + 1, edge, 1)
            by_tap = windows.reshape(-1, kernel[0] * kernel[1] * kernel[2]).t()
            targets = [(row >= 0).nonzero().squeeze(1) for row in by_tap]
            self._pairs[kernel] = [(target, row[target].long()) for target, row in zip(targets, by_tap)]
        return self._pairs[kernel]


def neighbour_blocks(cells: torch.Tensor, batch_size: int, grid: Size3, reach: Size3) -> torch.Tensor:
    """Index of the visible block at every cell offset within ``reach``.

    Args:
        cells: int64 ``(n, 4)``: sample and cell coordinates ``(b, g0, g1, g2)`` of every visible block.
        batch_size: number of samples.
        grid: cells per axis.
        reach: how many cells to look in either direction per axis.

    Returns:
        int64 ``(n, 2*reach0+1, 2*reach1+1, 2*reach2+1)``; -1 where the neighbour is masked or outside.
    """
    padded = [g + 2 * r for g, r in zip(grid, reach)]
    lookup = torch.full((batch_size, *padded), -1, dtype=torch.long, device=cells.device)
    b, i, j, k = cells.unbind(1)
    lookup[b, i + reach[0], j + reach[1], k + reach[2]] = torch.arange(len(cells), device=cells.device)
    offsets = [torch.arange(2 * r + 1, device=cells.device) for r in reach]
    return lookup[
        b[:, None, None, None],
        i[:, None, None, None] + offsets[0][None, :, None, None],
        j[:, None, None, None] + offsets[1][None, None, :, None],
        k[:, None, None, None] + offsets[2][None, None, None, :],
    ]


def halo_table(
    cells: torch.Tensor, batch_size: int, grid: Size3, block: Size3, radius: Size3, hidden: str = "zero"
) -> HaloTable:
    """Builds the gather table for blocks of shape ``block`` and a halo of ``radius`` voxels per side.

    Works for any radius, also one that is larger than a block. ``hidden``: what stands for masked voxels, ``"zero"`` or
    ``"nearest"``, the nearest voxel of the block that the halo belongs to.
    """
    device = cells.device
    reach = tuple(-(-r // s) for r, s in zip(radius, block))
    neighbours = neighbour_blocks(cells, batch_size, grid, (reach[0], reach[1], reach[2]))
    cell_offset, local = [], []
    for s, r, far in zip(block, radius, reach):
        position = torch.arange(-r, s + r, device=device)
        cell_offset.append(torch.div(position, s, rounding_mode="floor") + far)
        local.append(position % s)
    source_block = neighbours[:, cell_offset[0]][:, :, cell_offset[1]][:, :, :, cell_offset[2]]
    local_row = (local[0][:, None, None] * block[1] + local[1][None, :, None]) * block[2] + local[2][None, None, :]
    per_block = block[0] * block[1] * block[2]
    rows = source_block * per_block + local_row
    is_missing = source_block < 0
    padded = (block[0] + 2 * radius[0], block[1] + 2 * radius[1], block[2] + 2 * radius[2])
    if hidden == "zero":
        empty = is_missing.flatten().nonzero().squeeze(1)
        return HaloTable(rows.masked_fill(is_missing, 0).flatten(), empty, padded)
    inside, nearest = [], []
    for axis, (s, r) in enumerate(zip(block, radius)):
        cell = cells[:, axis + 1, None] + (cell_offset[axis] - reach[axis])[None]
        inside.append((cell >= 0) & (cell < grid[axis]))
        nearest.append(torch.arange(-r, s + r, device=device).clamp(0, s - 1))
    in_volume = inside[0][:, :, None, None] & inside[1][:, None, :, None] & inside[2][:, None, None, :]
    own_row = (nearest[0][:, None, None] * block[1] + nearest[1][None, :, None]) * block[2] + nearest[2][None, None, :]
    own = torch.arange(len(cells), device=device)[:, None, None, None] * per_block + own_row
    empty = (~in_volume).flatten().nonzero().squeeze(1)
    return HaloTable(torch.where(is_missing, own, rows).flatten(), empty, padded, symmetric=False)


def attach_halo(blocks: torch.Tensor, table: HaloTable) -> torch.Tensor:
    """Returns blocks with their halo.

    Args:
        blocks: ``(n, C, s0, s1, s2)``, best in ``torch.channels_last_3d`` memory (then no copy is made first).
        table: made for this block shape.

    Returns:
        ``(n, C, p0, p1, p2)`` in channels-last memory.
    """
    n, channels = blocks.shape[:2]
    rows = blocks.permute(0, 2, 3, 4, 1).reshape(-1, channels)
    padded = rows.index_select(0, table.source).index_fill_(0, table.empty, 0)
    return padded.view(n, *table.padded, channels).permute(0, 4, 1, 2, 3)


def fold_halo(padded: torch.Tensor, table: HaloTable, block: Size3) -> torch.Tensor:
    """Adjoint of :func:`attach_halo`: every voxel of the blocks gets the sum of what lies where it was read.

    Args:
        padded: ``(n, C, p0, p1, p2)``.
        table: made for this block shape.
        block: edge lengths ``(s0, s1, s2)``.

    Returns:
        ``(n, C, s0, s1, s2)`` in channels-last memory; sums are taken in float32 or better.
    """
    n, channels = padded.shape[:2]
    dtype = torch.promote_types(padded.dtype, torch.float32)
    rows = padded.permute(0, 2, 3, 4, 1).reshape(-1, channels).to(dtype).index_fill(0, table.empty, 0)
    sums = torch.zeros(n * block[0] * block[1] * block[2], channels, dtype=dtype, device=padded.device)
    sums.index_add_(0, table.source, rows)
    return sums.to(padded.dtype).view(n, *block, channels).permute(0, 4, 1, 2, 3)
