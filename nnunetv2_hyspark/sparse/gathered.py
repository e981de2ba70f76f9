"""Submanifold convolution as one matrix product per kernel tap, over the pairs of voxels that see each other.

A convolution on small blocks spends most of its work on hidden neighbours: of the products of a 3x3x3 kernel on blocks
of 2 voxels per edge, a quarter of them visible, two in five count. Here only those are computed. The price is a gather
and a sum per tap, so it pays for small blocks with many channels.
"""

from __future__ import annotations

import torch

from ..geometry import as_size3
from .halo import HaloTable


class _GatheredConv3d(torch.autograd.Function):
    """See :func:`gathered_conv3d`; on rows ``(R, I)`` and taps ``(k, I, O)``."""

    @staticmethod
    def forward(ctx, rows, taps, bias, pairs):
        ctx.save_for_backward(rows, taps)
        ctx.pairs, ctx.has_bias = pairs, bias is not None
        out = rows.new_zeros(rows.shape[0], taps.shape[2]) if bias is None else bias.repeat(rows.shape[0], 1)
        for tap, (target, source) in zip(taps, pairs):
            out.index_add_(0, target, rows.index_select(0, source) @ tap)
        return out

    @staticmethod
    def backward(ctx, grad):
        rows, taps = ctx.saved_tensors
        grad = grad.contiguous()
        grad_rows = torch.zeros_like(rows) if ctx.needs_input_grad[0] else None
        grad_taps = torch.empty_like(taps) if ctx.needs_input_grad[1] else None
        for index, (target, source) in enumerate(ctx.pairs):
            part = grad.index_select(0, target)
            if grad_rows is not None:
                grad_rows.index_add_(0, source, part @ taps[index].t())
            if grad_taps is not None:
                torch.mm(rows.index_select(0, source).t(), part, out=grad_taps[index])
        return grad_rows, grad_taps, grad.sum(0) if ctx.has_bias else None, None


def gathered_conv3d(
    blocks: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, table: HaloTable
) -> torch.Tensor:
    """Same-padded convolution of blocks, with stride 1 and without groups.

    Args:
        blocks: ``(n, I, s0, s1, s2)``.
        weight: ``(O, I, k0, k1, k2)``, every k odd.
        bias: ``(O,)`` or None.
        table: halo table of radius ``k // 2``.

    Returns:
        ``(n, O, s0, s1, s2)`` in channels-last memory.
    """
    n, channels = blocks.shape[:2]
    block, kernel = as_size3(blocks.shape[2:]), as_size3(weight.shape[2:])
    rows = blocks.permute(0, 2, 3, 4, 1).reshape(-1, channels)
    taps = weight.permute(2, 3, 4, 1, 0).reshape(-1, channels, len(weight))
    out = _GatheredConv3d.apply(rows, taps, bias, table.pairs(kernel))
    return out.view(n, *block, len(weight)).permute(0, 4, 1, 2, 3)
