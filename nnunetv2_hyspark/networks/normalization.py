"""Instance and batch normalisation that stay in channels-last memory and are accurate there.

On the CPU, ``torch.nn.InstanceNorm3d`` copies a channels-last map to contiguous memory and returns it so, which slows
every convolution after it; ``torch.nn.BatchNorm3d`` stays in channels-last memory but sums naively there (errors of
1e-3
at 96^3 voxels in float32). Here mean and variance come from torch's own accurate reductions.
"""

from __future__ import annotations

import torch
from torch import nn

CACHED_VALUES = 2**18
"""Values of float32 that a processor's core keeps at hand."""


def _rows(x: torch.Tensor, groups: int) -> torch.Tensor:
    """``(B, C, D, H, W)`` as ``(groups, voxels, C)`` in float32 or better; a view in channels-last float memory."""
    rows = x.permute(0, 2, 3, 4, 1).reshape(groups, -1, x.shape[1])
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _parts(rows: torch.Tensor) -> int:
    """How many voxels to go through at once: on the CPU as many as stay in its cache between two operations."""
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return rows.shape[1]
    return max(CACHED_VALUES // (rows.shape[0] * rows.shape[2]), 1)


def _per_channel(values: torch.Tensor) -> torch.Tensor:
    """``(groups, C)`` as ``(groups, C, 1, 1, 1)``."""
    return values[:, :, None, None, None]


@torch.no_grad()
def statistics(x: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of every channel in every group of samples.

    Args:
        x: ``(B, C, D, H, W)``.
        groups: B for one group per sample, 1 for one group in all.

    Returns:
        Two tensors ``(groups, C)``, float32 or better.
    """
    rows = _rows(x, groups)
    return _statistics_in_parts(rows) if rows.device.type == "cpu" else _statistics_at_once(rows)


def _statistics_at_once(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of rows ``(groups, n, C)``: one pass over memory, which is what bounds GPUs."""
    variance, mean = torch.var_mean(rows, 1, correction=0)
    return mean, variance


def _statistics_in_parts(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in two passes, of which the second goes through parts that stay in the CPU's cache; PyTorch's own takes
    longer there."""
    mean = rows.mean(1)
    shift = mean[:, None]
    squares = torch.stack([(part - shift).square_().sum(1) for part in rows.split(_parts(rows), 1)])
    return mean, squares.sum(0) / rows.shape[1]


class _Normalise(torch.autograd.Function):
    """See :func:`normalise`. Keeps the input and its statistics for the backward pass, nothing else."""

    @staticmethod
    def forward(ctx, x, mean, rstd, weight, bias):
        scale = rstd * weight
        ctx.save_for_backward(x, mean, rstd, weight)
        wide = x.to(mean.dtype)
        return torch.addcmul(_per_channel(bias - mean * scale), wide, _per_channel(scale)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        x, mean, rstd, weight = ctx.saved_tensors
        groups = len(mean)
        rows, grad = _rows(x, groups), _rows(grad_output, groups)
        grad_sum = grad.sum(1)
        count = _parts(rows)
        products = torch.stack([(g * r).sum(1) for g, r in zip(grad.split(count, 1), rows.split(count, 1))])
        grad_dot = products.sum(0) - mean * grad_sum
        by_grad = weight * rstd
        by_input = -by_grad * rstd.square() * grad_dot / rows.shape[1]
        constant = -by_grad * grad_sum / rows.shape[1] - by_input * mean
        grad_x = torch.addcmul(_per_channel(constant), grad_output.to(mean.dtype), _per_channel(by_grad))
        grad_x = grad_x.addcmul_(x.to(mean.dtype), _per_channel(by_input)).to(x.dtype)
        grad_weight = (grad_dot * rstd).sum(0).to(weight.dtype)
        return grad_x, None, None, grad_weight, grad_sum.sum(0).to(weight.dtype)


def normalise(
    x: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Normalises by the map's own statistics; the gradient knows that they depend on the map.

    Args:
        x: ``(B, C, D, H, W)``.
        mean, variance: of x, ``(groups, C)``, see :func:`statistics`.
        weight, bias: ``(C,)``.
        eps: added to the variance.

    Returns:
        Shape, dtype and memory format of x.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _Normalise.apply(x, mean, (variance + eps).rsqrt(), weight, bias)


class InstanceNorm3d(nn.InstanceNorm3d):
    """``torch.nn.InstanceNorm3d(channels, affine=True)``, in channels-last memory."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__(channels, eps, affine=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape as the input."""
        return normalise(x, *statistics(x, x.shape[0]), self.weight, self.bias, self.eps)


class BatchNorm3d(nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d(channels)``, accurate in channels-last memory; PyTorch's own outside training."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape as the input."""
        if not self.training:
            return super().forward(x)
        mean, variance = statistics(x, 1)
        count = x.numel() // x.shape[1]
        for name, value in (("running_mean", mean[0]), ("running_var", variance[0] * count / max(count - 1, 1))):
            buffer = self.get_buffer(name)
            # a step whose activations overflow is skipped; its statistics must not stay
            finite = torch.where(value.isfinite(), value.to(buffer.dtype), buffer)
            buffer.lerp_(finite, self.momentum or 0.1)
        self.get_buffer("num_batches_tracked").add_(1)
        return normalise(x, mean, variance, self.weight, self.bias, self.eps)
