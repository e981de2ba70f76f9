"""Up-sampling followed by fusion with a skip feature, on dense maps."""

from __future__ import annotations

import torch
from torch import nn

from ..geometry import as_size3
from ..linear import linear, runs_on_onednn


def upsample_and_fuse(x: torch.Tensor, skip: torch.Tensor, up: nn.ConvTranspose3d, fuse: nn.Conv3d) -> torch.Tensor:
    """``fuse(torch.cat([up(x), skip], 1))``.

    On CPUs the two layers are merged: the part of ``fuse`` that reads ``up``'s output is multiplied into its weights.
    So there is neither that output nor the concatenated map, and with one thread not PyTorch's slow way of convolving
    with a kernel of one.

    Args:
        x: coarse features ``(B, I, d, h, w)``.
        skip: ``(B, S, d * s0, h * s1, w * s2)``.
        up: from ``I`` to ``U`` channels, its kernel equal to its stride ``(s0, s1, s2)``.
        fuse: from ``U + S`` to ``O`` channels, with a kernel of one.

    Returns:
        ``(B, O, d * s0, h * s1, w * s2)``.

    Raises:
        ValueError: if the skip has another size.
    """
    stride = as_size3(up.stride)
    size = tuple(n * s for n, s in zip(x.shape[2:], stride))
    if tuple(skip.shape[2:]) != size:
        raise ValueError(
            f"the skip feature has {tuple(skip.shape[2:])} voxels; expected {size}, the coarse feature's times the "
            f"stride {stride}; give images whose size the network's strides divide."
        )
    if not runs_on_onednn(x) or up.bias is None or fuse.bias is None:
        return fuse(torch.cat([up(x), skip], dim=1))
    batch, inputs, *coarse = x.shape
    of_up, of_skip = fuse.weight.flatten(1).split([up.out_channels, skip.shape[1]], dim=1)
    merged = torch.einsum("ou,iuxyz->xyzoi", of_up, up.weight).reshape(-1, inputs)
    upsampled = linear(x.permute(0, 2, 3, 4, 1), merged).reshape(batch, *coarse, *stride, -1)
    fused = linear(skip.permute(0, 2, 3, 4, 1), of_skip, fuse.bias + of_up @ up.bias)
    # every fine voxel as coarse voxel and place in it
    split = fused.reshape(batch, *(n for pair in zip(coarse, stride) for n in pair), -1)
    fused = (split + upsampled.permute(0, 1, 4, 2, 5, 3, 6, 7)).reshape(fused.shape)
    return fused.permute(0, 4, 1, 2, 3)
