"""LayerNorm, expansion, GELU, compression and residual of MedNeXt's blocks in one pass over voxels, on CPUs.

Layer by layer, maps of the expanded width are written and kept for the backward pass. Here so many voxels at a time
pass through all layers that their expanded features stay in the caches, and the backward pass computes these features
again from the block's own width. It takes as long as layer by layer, and less than half of the memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .linear import IMAGES, linear, runs_on_onednn

EXPANDED = 2**20
"""Expanded features that pass at once: 4 MB, of which one core's second-level cache holds a quarter to all."""


def rows_at_once(expanded_width: int) -> int:
    """Voxels that pass at once; a multiple of what :func:`nnunetv2_hyspark.linear.linear` likes."""
    return max(1, EXPANDED // (IMAGES * expanded_width)) * IMAGES


def passes_once(voxels: torch.Tensor, expanded_width: int) -> bool:
    """Whether this module serves: where oneDNN's linear layers do, and from two passes on.

    Args:
        voxels: ``(..., C)``.
        expanded_width: features per voxel after expansion.
    """
    return runs_on_onednn(voxels) and voxels.numel() // voxels.shape[-1] >= 2 * rows_at_once(expanded_width)


def _parts(rows: int, expanded_width: int) -> Iterator[slice]:
    step = rows_at_once(expanded_width)
    return (slice(start, start + step) for start in range(0, rows, step))


def _weight_gradient(grad_output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``grad_output.T @ x`` of ``(R, O)`` and ``(R, I)``, as oneDNN's gradient of a convolution with kernel one."""
    images = IMAGES if len(x) % IMAGES == 0 else 1
    maps = [t.reshape(images, -1, 1, t.shape[-1]).permute(0, 3, 1, 2) for t in (grad_output, x)]
    weight = x.new_empty(grad_output.shape[1], x.shape[1], 1, 1)
    return torch.ops.aten.convolution_backward(
        *maps, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]
    )[1].flatten(1)


class _InvertedBottleneck(torch.autograd.Function):
    """See :func:`inverted_bottleneck`."""

    @staticmethod
    def forward(ctx, voxels, residual, norm_weight, norm_bias, eps, expand, expand_bias, compress, compress_bias):
        ctx.save_for_backward(voxels, norm_weight, norm_bias, expand, expand_bias, compress)
        ctx.eps = eps
        width = voxels.shape[-1]
        rows, residual_rows = voxels.reshape(-1, width), residual.reshape(-1, width)
        out = torch.empty_like(rows)
        for part in _parts(len(rows), len(expand)):
            hidden = F.layer_norm(rows[part], (width,), norm_weight, norm_bias, eps)
            hidden = F.gelu(linear(hidden, expand, expand_bias))
            torch.add(residual_rows[part], linear(hidden, compress, compress_bias), out=out[part])
        return out.reshape(voxels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        voxels, norm_weight, norm_bias, expand, expand_bias, compress = ctx.saved_tensors
        width = voxels.shape[-1]
        rows, grad_rows = voxels.reshape(-1, width), grad_output.reshape(-1, width)
        grad_voxels = torch.empty_like(rows)
        trained = any(ctx.needs_input_grad[2:])
        grads = [torch.zeros_like(p) for p in (norm_weight, norm_bias, expand, expand_bias, compress)]
        grad_norm_weight, grad_norm_bias, grad_expand, grad_expand_bias, grad_compress = grads
        for part in _parts(len(rows), len(expand)):
            x, grad = rows[part], grad_rows[part]
            normed, mean, rstd = torch.native_layer_norm(x, (width,), norm_weight, norm_bias, ctx.eps)
            expanded = linear(normed, expand, expand_bias)
            grad_expanded = torch.ops.aten.gelu_backward(linear(grad, compress.T), expanded)
            grad_voxels[part], of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
                linear(grad_expanded, expand.T), x, (width,), mean, rstd, norm_weight, norm_bias,
                [True, trained, trained],
            )
            if trained:
                grad_compress += _weight_gradient(grad, F.gelu(expanded))
                grad_expand += _weight_gradient(grad_expanded, normed)
                grad_expand_bias += grad_expanded.sum(0)
                grad_norm_weight += of_weight
                grad_norm_bias += of_bias
        if not trained:
            return grad_voxels.reshape(voxels.shape), grad_output, *[None] * 7
        return (
            grad_voxels.reshape(voxels.shape), grad_output, grad_norm_weight, grad_norm_bias, None, grad_expand,
            grad_expand_bias, grad_compress, grad_rows.sum(0),
        )


def inverted_bottleneck(
    voxels: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    expand: torch.Tensor,
    expand_bias: torch.Tensor,
    compress: torch.Tensor,
    compress_bias: torch.Tensor,
) -> torch.Tensor:
    """``residual + compress @ gelu(expand @ layer_norm(voxels) + expand_bias) + compress_bias`` per voxel.

    Use it where :func:`passes_once` says so. Differentiable once.

    Args:
        voxels: float32 ``(..., C)``.
        residual: ``(..., C)``.
        norm_weight, norm_bias: ``(C,)``.
        eps: of the LayerNorm.
        expand, expand_bias: ``(E, C)`` and ``(E,)``.
        compress, compress_bias: ``(C, E)`` and ``(C,)``.

    Returns:
        ``(..., C)``.
    """
    return _InvertedBottleneck.apply(
        voxels, residual, norm_weight, norm_bias, eps, expand, expand_bias, compress, compress_bias
    )
