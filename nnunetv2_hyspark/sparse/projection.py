"""Convolution of a densified sparse map for the cost of its visible blocks.

A map whose masked voxels all hold the same vector is that vector everywhere plus the visible blocks' difference to it.
So its convolution is the constant's response, which only differs at the border of the volume, plus the convolution of
the differences, which is zero but in visible blocks and a rim around them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch.nn import functional as F

from ..geometry import Size3, as_size3, multiply, volume
from .border import border_response, correct_border, inside_of, response_gradient


def sparse_projection_pays(block: Size3, kernel: Size3, visible_share: float) -> bool:
    """Whether :func:`project_densified` costs clearly fewer multiplications than the dense convolution.

    Args:
        block: voxels of a visible block per axis.
        kernel: odd sizes.
        visible_share: fraction of cells that are visible.
    """
    if any(k // 2 > s for k, s in zip(kernel, block)):
        return False
    grown = volume([s + k - 1 for s, k in zip(block, kernel)])
    return visible_share * grown < 0.7 * volume(block)


def _slabs(direction: int, edge: int, reach: int) -> tuple[slice, slice]:
    """Along one axis: where the part of a grown block that reaches into the neighbour in this direction lies, in the
    grown block and in the neighbour."""
    if direction < 0:
        return slice(0, reach), slice(edge - reach, edge)
    if direction > 0:
        return slice(edge + reach, edge + 2 * reach), slice(0, reach)
    return slice(reach, edge + reach), slice(0, edge)


@dataclass(frozen=True)
class Rims:
    """Where grown blocks lie in a map, direction by direction; made once per mask, for any block shape.

    Attributes:
        parts: per direction ``(d0, d1, d2)`` in -1, 0, 1: int64 ``(m,)`` indices of the blocks whose neighbour in this
            direction is inside the volume, and int64 ``(m, 4)`` sample and cell of that neighbour.
    """

    parts: tuple[tuple[Size3, torch.Tensor, torch.Tensor], ...]


def rims(cells: torch.Tensor, grid: Size3, reach: Size3) -> Rims:
    """Places the blocks at ``cells`` ``(n, 4)``, grown by ``reach`` voxels per side."""
    steps = [(-1, 0, 1) if r else (0,) for r in reach]
    directions: list[Size3] = list(product(steps[0], steps[1], steps[2]))
    # all directions at once, since a GPU has to be waited for wherever a size depends on the mask
    places = cells + torch.tensor([(0, *direction) for direction in directions], device=cells.device)[:, None]
    inside = ((places[..., 1:] >= 0) & (places[..., 1:] < torch.tensor(grid, device=cells.device))).all(-1)
    which, block = inside.nonzero().unbind(1)
    counts = inside.sum(1).tolist()
    return Rims(tuple(zip(directions, block.split(counts), places[which, block].split(counts))))


def add_grown_blocks(canvas: torch.Tensor, grown: torch.Tensor, placement: Rims) -> None:
    """Adds blocks with their rims to a map, in place; what lies outside the volume is dropped.

    Args:
        canvas: ``(B, g0, g1, g2, s0, s1, s2, C)``.
        grown: ``(n, s0 + 2 r0, s1 + 2 r1, s2 + 2 r2, C)`` with ``r <= s``.
        placement: of these blocks.
    """
    block = canvas.shape[4:7]
    reach = [(p - s) // 2 for p, s in zip(grown.shape[1:4], block)]
    for direction, inside, places in placement.parts:
        source, target = zip(*(_slabs(d, s, r) for d, s, r in zip(direction, block, reach)))
        part = grown[:, source[0], source[1], source[2]].index_select(0, inside)
        b, i, j, k = places.unbind(1)
        # Within one direction no two blocks meet in the same cell, so nothing is lost by plain assignment.
        canvas[:, :, :, :, target[0], target[1], target[2]][b, i, j, k] += part


def take_grown_blocks(dense: torch.Tensor, cells: torch.Tensor, block: Size3, reach: Size3) -> torch.Tensor:
    """Adjoint of :func:`add_grown_blocks`: windows of a dense map around cells, zero outside the volume.

    Args:
        dense: ``(B, C, D, H, W)``.
        cells: int64 ``(n, 4)``.
        block: cell size.
        reach: rim per side.

    Returns:
        ``(n, C, s0 + 2 r0, s1 + 2 r1, s2 + 2 r2)`` in channels-last memory.
    """
    (r0, r1, r2), (s0, s1, s2) = reach, block
    windows = F.pad(dense.permute(0, 2, 3, 4, 1), [0, 0, r2, r2, r1, r1, r0, r0])
    windows = windows.unfold(1, s0 + 2 * r0, s0).unfold(2, s1 + 2 * r1, s1).unfold(3, s2 + 2 * r2, s2)
    b, i, j, k = cells.unbind(1)
    return windows.permute(0, 1, 2, 3, 5, 6, 7, 4)[b, i, j, k].permute(0, 4, 1, 2, 3)


class _AddProjectedBlocks(torch.autograd.Function):
    """The constant's response plus the convolution of the blocks alone; see :func:`project_densified`."""

    @staticmethod
    def forward(ctx, difference, weight, response, cells, placement, batch_size, grid):
        block = as_size3(difference.shape[2:])
        out_channels = weight.shape[0]
        padding = [k - 1 for k in weight.shape[2:]]
        grown = F.conv3d(difference, weight, padding=padding).permute(0, 2, 3, 4, 1)
        (g0, g1, g2), (s0, s1, s2) = grid, block
        canvas = difference.new_empty(batch_size, *multiply(grid, block), out_channels).permute(0, 4, 1, 2, 3)
        canvas.copy_(inside_of(response).view(1, -1, 1, 1, 1))
        correct_border(canvas, response)
        view = canvas.permute(0, 2, 3, 4, 1).view(batch_size, g0, s0, g1, s1, g2, s2, out_channels)
        add_grown_blocks(view.permute(0, 1, 3, 5, 2, 4, 6, 7), grown, placement)
        ctx.save_for_backward(difference, weight, cells)
        ctx.padding, ctx.entries = padding, as_size3(response.shape[1:])
        return canvas

    @staticmethod
    def backward(ctx, grad_output):
        difference, weight, cells = ctx.saved_tensors
        reach = half_kernel(weight)
        grown = take_grown_blocks(grad_output, cells, as_size3(difference.shape[2:]), reach)
        grad_difference, grad_weight, _ = torch.ops.aten.convolution_backward(
            grown, difference, weight, None, [1, 1, 1], ctx.padding, [1, 1, 1], False, [0, 0, 0], 1,
            [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False],
        )
        grad_response = None
        if ctx.needs_input_grad[2]:
            rows = grad_output.permute(0, 2, 3, 4, 1).reshape(-1, grad_output.shape[1])
            total = rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32))
            grad_response = response_gradient(grad_output, total, ctx.entries).to(weight.dtype)
        return grad_difference, grad_weight, grad_response, None, None, None, None


def half_kernel(weight: torch.Tensor) -> Size3:
    """Half the kernel's size per axis."""
    return weight.shape[2] // 2, weight.shape[3] // 2, weight.shape[4] // 2


def project_densified(
    blocks: torch.Tensor,
    fill: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cells: torch.Tensor,
    placement: Rims,
    batch_size: int,
    grid: Size3,
) -> torch.Tensor:
    """``conv3d(densify(blocks, fill), weight, bias, padding="same")``, without making the dense input.

    Args:
        blocks: visible blocks ``(n, C, s0, s1, s2)``.
        fill: ``(C,)``, what every masked voxel holds.
        weight, bias: ``(O, C, k0, k1, k2)`` with odd ``k <= 2 s + 1``, and ``(O,)`` or None.
        cells: int64 ``(n, 4)``, sample and cell of every block.
        placement: of these cells, with the kernel's reach.
        batch_size, grid: of the dense map.

    Returns:
        ``(B, O, g0 * s0, g1 * s1, g2 * s2)`` in channels-last memory.
    """
    device_type = blocks.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        blocks, fill, weight = blocks.to(dtype), fill.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(device_type, enabled=False):
        response = border_response(fill.to(blocks.dtype), weight, multiply(grid, as_size3(blocks.shape[2:])))
        if bias is not None:
            response = response + bias.view(-1, 1, 1, 1)
        difference = blocks - fill.to(blocks.dtype).view(1, -1, 1, 1, 1)
        return _AddProjectedBlocks.apply(difference, weight, response, cells, placement, batch_size, grid)
