"""Instance normalisation over the visible voxels of each sample."""

from __future__ import annotations

import torch


def instance_norm(
    blocks: torch.Tensor,
    sample: torch.Tensor,
    batch_size: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Normalises every channel of every sample by the mean and biased variance of its visible voxels.

    Args:
        blocks: ``(n, C, s0, s1, s2)``.
        sample: int64 ``(n,)``, the sample each block belongs to.
        batch_size: number of samples.
        weight, bias: ``(C,)`` or None.
        eps: added to the variance.

    Returns:
        Tensor of the shape of ``blocks``; statistics are computed in float32 or better.
    """
    x = blocks if blocks.dtype in (torch.float32, torch.float64) else blocks.float()
    channels = x.shape[1]
    per_block = x.shape[2] * x.shape[3] * x.shape[4]
    voxels = torch.zeros(batch_size, device=x.device, dtype=x.dtype)
    voxels = voxels.index_add(0, sample, torch.full_like(sample, per_block, dtype=x.dtype))
    zeros = torch.zeros(batch_size, channels, device=x.device, dtype=x.dtype)
    mean = zeros.index_add(0, sample, x.sum((2, 3, 4))) / voxels[:, None]
    centred = x - mean[sample][:, :, None, None, None]
    variance = zeros.index_add(0, sample, centred.square().sum((2, 3, 4))) / voxels[:, None]
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    out = centred * scale[sample][:, :, None, None, None]
    if bias is not None:
        out = out + bias[None, :, None, None, None]
    return out.to(blocks.dtype)
