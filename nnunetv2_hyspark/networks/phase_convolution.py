"""Transposed convolution followed by a convolution, computed on the coarse grid.

Both are linear, so together they are one linear map from the coarse to the fine grid. With a transposed kernel equal to
its stride of 2 and a convolution of size 3, every fine voxel depends on two coarse voxels per axis; its phase (even or
odd position) decides which. So each of the eight phases is a 2x2x2 convolution of the coarse map, 8 taps per fine voxel
in place of 27, and the up-sampled map in between is never made.
"""

from __future__ import annotations

from itertools import product

import torch
from torch.nn import functional as F

from ..geometry import Size3, as_size3, multiply, volume
from ..sparse.projection import border_response

# Per (stride, kernel) and phase: the first coarse offset, and for every coarse offset from there the pairs
# (tap of the convolution, position inside the transposed kernel) that meet in it.
_AXIS: dict[tuple[int, int], tuple[tuple[int, tuple[tuple[tuple[int, int], ...], ...]], ...]] = {
    (1, 1): ((0, (((0, 0),),)),),
    (1, 3): ((-1, (((0, 0),), ((1, 0),), ((2, 0),))),),
    (2, 1): ((0, (((0, 0),),)), (0, (((0, 1),),))),
    (2, 3): ((-1, (((0, 1),), ((1, 0), (2, 1)))), (0, (((0, 0), (1, 1)), ((2, 0),)))),
}


def has_phases(stride: Size3, kernel_size: Size3) -> bool:
    """Whether :func:`upsample_conv3d` knows this transposed stride and this convolution kernel."""
    return all(pair in _AXIS for pair in zip(stride, kernel_size))


def phases_pay(coarse_voxels: int, stride: Size3, kernel_size: Size3, channels: int) -> bool:
    """Whether phases cost fewer multiplications than the two convolutions, forward and backward.

    Merging the kernels costs ``volume(stride) * volume(kernel) * channels`` per pair of in- and output channels, once
    per step whatever the size of the map; so large maps gain and small ones with many channels lose. Merging is bound
    by memory and runs at about an eighth of a convolution's rate (measured on a CPU).

    Args:
        coarse_voxels: voxels of the coarse map, over the batch.
        stride: of the transposed convolution.
        kernel_size: of the convolution.
        channels: of the up-sampled map.
    """
    if not has_phases(stride, kernel_size):
        return False
    fine_voxels = coarse_voxels * volume(stride)
    taps = sum(
        volume([len(parts[axis][1]) for axis in range(3)])
        for parts in product(*(_AXIS[pair] for pair in zip(stride, kernel_size)))
    ) / volume(stride)
    merged = fine_voxels * taps + 8 * volume(stride) * volume(kernel_size) * channels
    return merged < 0.8 * fine_voxels * volume(kernel_size)


def merge_kernels(up_weight: torch.Tensor, weight: torch.Tensor, stride: Size3) -> dict[Size3, torch.Tensor]:
    """The convolution kernel of every phase.

    Args:
        up_weight: transposed kernel ``(I, M, *stride)``.
        weight: kernel ``(O, M, k0, k1, k2)``.
        stride: of the transposed convolution.

    Returns:
        Phase to kernel ``(O, I, a0, a1, a2)``, ``a`` coarse voxels per axis.
    """
    kernel_size = as_size3(weight.shape[2:])
    pairs = torch.einsum("omxyz,imuvw->xuyvzwoi", weight, up_weight)
    kernels = {}
    axes = [_AXIS[pair] for pair in zip(stride, kernel_size)]
    for phase in product(*(range(s) for s in stride)):
        parts = [axes[axis][phase[axis]][1] for axis in range(3)]
        rows = []
        for meets in product(*parts):
            terms = [
                pairs[t0, u0, t1, u1, t2, u2] for (t0, u0), (t1, u1), (t2, u2) in product(*meets)
            ]
            rows.append(torch.stack(terms).sum(0) if len(terms) > 1 else terms[0])
        size = [len(part) for part in parts]
        kernel = torch.stack(rows, dim=-1)
        kernels[(phase[0], phase[1], phase[2])] = kernel.view(*kernel.shape[:2], *size)
    return kernels


def upsample_conv3d(
    x: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Size3,
) -> torch.Tensor:
    """``conv3d(conv_transpose3d(x, up_weight, up_bias, stride), weight, bias, padding="same")`` by phases.

    Args:
        x: ``(B, I, D, H, W)``.
        up_weight, up_bias: ``(I, M, *stride)`` and ``(M,)``.
        weight, bias: ``(O, M, k0, k1, k2)`` and ``(O,)`` or None.
        stride: of the transposed convolution; see :func:`has_phases`.

    Returns:
        ``(B, O, D * stride0, H * stride1, W * stride2)``, in channels-last memory.
    """
    kernel_size = as_size3(weight.shape[2:])
    batch_size, out_channels = x.shape[0], weight.shape[0]
    coarse = as_size3(x.shape[2:])
    fine = multiply(coarse, stride)
    kernels = merge_kernels(up_weight, weight, stride)
    axes = [_AXIS[pair] for pair in zip(stride, kernel_size)]
    reach = [1 if k == 3 else 0 for k in kernel_size]
    padded = F.pad(x, [reach[2], reach[2], reach[1], reach[1], reach[0], reach[0]])
    outputs = []
    for phase, kernel in kernels.items():
        first = [axes[axis][phase[axis]][0] + reach[axis] for axis in range(3)]
        window = [slice(f, f + c + k - 1) for f, c, k in zip(first, coarse, kernel.shape[2:])]
        outputs.append(F.conv3d(padded[:, :, window[0], window[1], window[2]], kernel))
    stacked = torch.stack(outputs, dim=1).view(batch_size, *stride, out_channels, *coarse)
    interleaved = stacked.permute(0, 5, 1, 6, 2, 7, 3, 4).reshape(batch_size, *fine, out_channels)
    constant = border_response(up_bias, weight, fine)
    if bias is not None:
        constant = constant + bias.view(1, -1, 1, 1, 1)
    return interleaved.permute(0, 4, 1, 2, 3) + constant.to(interleaved.dtype)
