"""Depthwise 3D convolutions whose backward pass is as fast as their forward pass on the CPU.

PyTorch's CPU library (oneDNN) has kernels for depthwise 3D convolutions forward, but none backward: there it runs those
of general grouped convolutions, which take 5 to 20 times as long. The gradient of the input is itself a depthwise
convolution, with the kernel flipped; the gradient of the weight is a sum of 2D ones, for which there are kernels.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .geometry import Size3

VECTOR = 16
"""Channels that the 2D kernels take at once; they waste the rest where the number is no multiple."""


def has_fast_gradients(x: torch.Tensor, weight: torch.Tensor, groups: int) -> bool:
    """Whether this module's gradients serve: depthwise, float32, on a CPU with oneDNN, without autocast or compiler.

    Args:
        x: ``(N, C, D, H, W)``.
        weight: ``(O, C / groups, k0, k1, k2)``.
        groups: of the convolution.
    """
    return (
        not torch.compiler.is_compiling()  # first, because compilers cannot look into the rest
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and groups == x.shape[1] == weight.shape[0]
        and groups > 1
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )


def input_gradient(grad_output: torch.Tensor, weight: torch.Tensor, padding: Size3) -> torch.Tensor:
    """Gradient of a depthwise convolution's input.

    Args:
        grad_output: ``(N, C, D, H, W)``.
        weight: ``(C, 1, k0, k1, k2)``.
        padding: of the convolution, less than the kernel.

    Returns:
        ``(N, C, D + k0 - 1 - 2 * padding0, ...)``.
    """
    mirrored = [k - 1 - p for k, p in zip(weight.shape[2:], padding)]
    return F.conv3d(grad_output, weight.flip(2, 3, 4), padding=mirrored, groups=len(weight))


def weight_gradient(x: torch.Tensor, grad_output: torch.Tensor, weight: torch.Tensor, padding: Size3) -> torch.Tensor:
    """Gradient of a depthwise convolution's weight.

    Args:
        x: the input, ``(N, C, X0, X1, X2)``.
        grad_output: ``(N, C, D, H, W)``.
        weight: ``(C, 1, k0, k1, k2)``; only its form matters.
        padding: of the convolution.

    Returns:
        ``(C, 1, k0, k1, k2)``.
    """
    channels = len(weight)
    if channels % VECTOR:
        return torch.ops.aten.convolution_backward(
            grad_output, x, weight, None, [1, 1, 1], padding, [1, 1, 1], False, [0, 0, 0], channels,
            [False, True, False],
        )[1]
    planes = []
    for tap in range(weight.shape[2]):
        # the voxels of the output, from start to stop, whose tap lies inside the input
        start = max(0, padding[0] - tap)
        stop = min(grad_output.shape[2], x.shape[2] + padding[0] - tap)
        shift = tap - padding[0]
        if start >= stop:
            planes.append(torch.zeros_like(weight[:, :, tap]))
            continue
        planes.append(
            torch.ops.aten.convolution_backward(
                _slices(grad_output[:, :, start:stop]), _slices(x[:, :, start + shift : stop + shift]),
                weight[:, :, tap].contiguous(), None, [1, 1], padding[1:], [1, 1], False, [0, 0], channels,
                [False, True, False],
            )[1]
        )
    return torch.stack(planes, 2)


def _slices(x: torch.Tensor) -> torch.Tensor:
    """``(N, C, D, H, W)`` as ``(N * D, C, H, W)`` in channels-last memory; a view where that is possible."""
    return x.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)


class _DepthwiseConv3d(torch.autograd.Function):
    """See :func:`depthwise_conv3d`."""

    @staticmethod
    def forward(ctx, x, weight, bias, padding):
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return F.conv3d(x, weight, bias, padding=padding, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        grad_x = input_gradient(grad_output, weight, ctx.padding) if ctx.needs_input_grad[0] else None
        grad_weight = weight_gradient(x, grad_output, weight, ctx.padding) if ctx.needs_input_grad[1] else None
        grad_bias = grad_output.sum((0, 2, 3, 4)) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None


def depthwise_conv3d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: Size3
) -> torch.Tensor:
    """``torch.nn.functional.conv3d(x, weight, bias, padding=padding, groups=C)`` with the gradients of this module.

    Use it where :func:`has_fast_gradients` says so. Differentiable once.

    Args:
        x: ``(N, C, D, H, W)``.
        weight: ``(C, 1, k0, k1, k2)``.
        bias: ``(C,)`` or None.
        padding: less than the kernel, per axis.
    """
    if not torch.is_grad_enabled():
        return F.conv3d(x, weight, bias, padding=padding, groups=len(weight))
    return _DepthwiseConv3d.apply(x, weight, bias, padding)
