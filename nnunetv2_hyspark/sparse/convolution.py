"""Submanifold convolution on blocks: ``conv(x * mask) * mask`` for the cost of the visible voxels.

The operation is its own kind of adjoint: the gradient of the input is again a submanifold convolution, with the kernel
flipped and its channel axes swapped. So the backward pass gathers a halo of the output gradient instead of scattering,
and nothing but the blocks themselves is kept for it. Where masked voxels are not zero but the block's nearest voxel,
that symmetry is lost, and the gradient of the padded blocks is folded back.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..depthwise import has_fast_gradients, input_gradient, weight_gradient
from ..geometry import as_size3
from .halo import HaloTable, attach_halo, fold_halo


def adjoint_weight(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """Kernel of the transposed convolution: ``(O, I/g, k0, k1, k2)`` to ``(I, O/g, k0, k1, k2)``, flipped in space."""
    out_channels, in_per_group = weight.shape[:2]
    kernel = weight.shape[2:]
    swapped = weight.reshape(groups, out_channels // groups, in_per_group, *kernel).transpose(1, 2)
    return swapped.reshape(groups * in_per_group, out_channels // groups, *kernel).flip(2, 3, 4)


class _SubmanifoldConv3d(torch.autograd.Function):
    """Stride-1 convolution with odd kernel on blocks; see :func:`submanifold_conv3d`."""

    @staticmethod
    def forward(ctx, blocks, weight, bias, source, empty, padded, symmetric, groups):
        table = HaloTable(source, empty, padded, symmetric)
        ctx.save_for_backward(blocks, weight, source, empty)
        ctx.padded, ctx.symmetric, ctx.groups, ctx.has_bias = padded, symmetric, groups, bias is not None
        return F.conv3d(attach_halo(blocks, table), weight, bias, groups=groups)

    @staticmethod
    def backward(ctx, grad_output):
        blocks, weight, source, empty = ctx.saved_tensors
        table = HaloTable(source, empty, ctx.padded, ctx.symmetric)
        grad_blocks = grad_weight = grad_bias = None
        folds = ctx.needs_input_grad[0] and not ctx.symmetric
        wants_parameters = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        if ctx.needs_input_grad[0] and ctx.symmetric:
            grad_blocks = F.conv3d(
                attach_halo(grad_output, table), adjoint_weight(weight, ctx.groups), groups=ctx.groups
            )
        if has_fast_gradients(grad_output, weight, ctx.groups):
            if folds:
                grad_padded = input_gradient(grad_output, weight, (0, 0, 0))
            if wants_parameters:
                grad_weight = weight_gradient(attach_halo(blocks, table), grad_output, weight, (0, 0, 0))
                grad_bias = grad_output.sum((0, 2, 3, 4)) if ctx.has_bias else None
        elif folds or wants_parameters:
            bias_sizes = [weight.shape[0]] if ctx.has_bias else None
            grad_padded, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                grad_output, attach_halo(blocks, table), weight, bias_sizes,
                [1, 1, 1], [0, 0, 0], [1, 1, 1], False, [0, 0, 0], ctx.groups,
                [folds, wants_parameters, ctx.has_bias],
            )
        if folds:
            grad_blocks = fold_halo(grad_padded, table, as_size3(blocks.shape[2:]))
        return grad_blocks, grad_weight, grad_bias, None, None, None, None, None


def submanifold_conv3d(
    blocks: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    table: HaloTable | None,
    groups: int = 1,
    stride: tuple[int, int, int] = (1, 1, 1),
) -> torch.Tensor:
    """Same-padded convolution of a sparse feature map, evaluated at visible voxels only.

    With a table that leaves masked voxels zero, equal to ``conv3d(x * mask, padding=k // 2) * mask`` on the dense map,
    in values and gradients.

    Args:
        blocks: ``(n, I, s0, s1, s2)``.
        weight: ``(O, I / groups, k0, k1, k2)``, every k odd.
        bias: ``(O,)`` or None.
        table: halo table of radius ``k // 2``; None for a 1x1x1 kernel.
        groups: as in ``torch.nn.functional.conv3d``.
        stride: must divide the block's edges.

    Returns:
        ``(n, O, s0 / stride0, s1 / stride1, s2 / stride2)``.
    """
    device_type = blocks.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        blocks, weight = blocks.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if table is None:
        return F.conv3d(blocks, weight, bias, stride=stride, groups=groups)
    if stride != (1, 1, 1):
        return F.conv3d(attach_halo(blocks, table), weight, bias, stride=stride, groups=groups)
    with torch.autocast(device_type, enabled=False):
        return _SubmanifoldConv3d.apply(
            blocks, weight, bias, table.source, table.empty, table.padded, table.symmetric, groups
        )
