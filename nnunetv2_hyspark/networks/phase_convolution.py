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
from ..sparse.border import border_response, correct_border, inside_of, response_gradient

# Per (stride, kernel) and phase: the first coarse offset, and for every coarse offset from there the pairs
# (tap of the convolution, position inside the transposed kernel) that meet in it.
_AXIS: dict[tuple[int, int], tuple[tuple[int, tuple[tuple[tuple[int, int], ...], ...]], ...]] = {
    (1, 1): ((0, (((0, 0),),)),),
    (1, 3): ((-1, (((0, 0),), ((1, 0),), ((2, 0),))),),
    (2, 1): ((0, (((0, 0),),)), (0, (((0, 1),),))),
    (2, 3): ((-1, (((0, 1),), ((1, 0), (2, 1)))), (0, (((0, 0), (1, 1)), ((2, 0),)))),
}


def _phases(stride: Size3) -> list[Size3]:
    """Positions inside a coarse voxel."""
    return [(i, j, k) for i in range(stride[0]) for j in range(stride[1]) for k in range(stride[2])]


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
    # all taken apart at once: the gradient of one after the other is a whole map of zeros each
    shape = pairs.shape[:6]
    taken = dict(zip(product(*map(range, shape)), pairs.flatten(0, 5).unbind()))
    kernels = {}
    axes = [_AXIS[pair] for pair in zip(stride, kernel_size)]
    for phase in _phases(stride):
        parts = [axes[axis][phase[axis]][1] for axis in range(3)]
        rows = []
        for meets in product(*parts):
            terms = [taken[t0, u0, t1, u1, t2, u2] for (t0, u0), (t1, u1), (t2, u2) in product(*meets)]
            rows.append(torch.stack(terms).sum(0) if len(terms) > 1 else terms[0])
        size = [len(part) for part in parts]
        kernel = torch.stack(rows, dim=-1)
        kernels[phase] = kernel.view(*kernel.shape[:2], *size)
    return kernels


def _same_padding(kernel: torch.Tensor) -> list[int]:
    return [k // 2 for k in kernel.shape[2:]]


def _cropped(phase: Size3, stride: Size3, kernel_size: Size3, coarse: Size3) -> tuple[slice, ...]:
    """What a phase needs of its convolution with padding, which has a voxel too many where the kernel is even."""
    slices = []
    for p, s, k, c in zip(phase, stride, kernel_size, coarse):
        first, taps = _AXIS[s, k][p][0], len(_AXIS[s, k][p][1])
        slices.append(slice(first + taps // 2, first + taps // 2 + c))
    return (slice(None), slice(None), *slices)


def _phase_of(fine: torch.Tensor, phase: Size3, stride: Size3) -> torch.Tensor:
    """A view of every ``stride``-th voxel of a map ``(B, C, D, H, W)``, from ``phase`` on."""
    (p0, p1, p2), (s0, s1, s2) = phase, stride
    return fine[:, :, p0::s0, p1::s1, p2::s2]


class _PhaseConv3d(torch.autograd.Function):
    """The convolutions of all phases, interleaved, plus a response that is constant but at the border.

    Each convolution reads the map itself, with padding, and its result is copied to its place once; in the backward
    pass gradients are added up in place. Slicing and stacking would copy every map several times.
    """

    @staticmethod
    def forward(ctx, x, response, stride, kernel_size, *kernels):
        coarse = as_size3(x.shape[2:])
        fine = multiply(coarse, stride)
        ctx.save_for_backward(x, *kernels)
        ctx.stride, ctx.kernel_size = stride, kernel_size
        ctx.entries = as_size3(response.shape[1:])
        inside = inside_of(response).contiguous()
        out = x.new_empty(x.shape[0], *fine, len(response)).permute(0, 4, 1, 2, 3)
        for phase, kernel in zip(_phases(stride), kernels):
            result = F.conv3d(x, kernel, inside, padding=_same_padding(kernel))
            _phase_of(out, phase, stride).copy_(result[_cropped(phase, stride, kernel_size, coarse)])
        correct_border(out, response)
        return out

    @staticmethod
    def backward(ctx, grad_output):
        x, *kernels = ctx.saved_tensors
        stride, kernel_size = ctx.stride, ctx.kernel_size
        coarse = as_size3(x.shape[2:])
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        grad_kernels = []
        total = x.new_zeros(len(kernels[0]), dtype=torch.promote_types(x.dtype, torch.float32))
        for phase, kernel in zip(_phases(stride), kernels):
            padding = _same_padding(kernel)
            size = [c + 2 * p - k + 1 for c, p, k in zip(coarse, padding, kernel.shape[2:])]
            grad = x.new_zeros(x.shape[0], *size, len(kernel)).permute(0, 4, 1, 2, 3)
            grad[_cropped(phase, stride, kernel_size, coarse)] = _phase_of(grad_output, phase, stride)
            of_x, of_kernel, of_bias = torch.ops.aten.convolution_backward(
                grad, x, kernel, [len(kernel)], [1, 1, 1], padding, [1, 1, 1], False, [0, 0, 0], 1,
                [ctx.needs_input_grad[0], True, True],
            )
            if grad_x is not None:
                grad_x += of_x
            grad_kernels.append(of_kernel)
            total += of_bias
        grad_response = response_gradient(grad_output, total, ctx.entries).to(x.dtype)
        return grad_x, grad_response, None, None, *grad_kernels


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
    response = border_response(up_bias, weight, multiply(as_size3(x.shape[2:]), stride))
    if bias is not None:
        response = response + bias.view(-1, 1, 1, 1)
    kernels = merge_kernels(up_weight, weight, stride)
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x, kernels = x.to(dtype), {phase: kernel.to(dtype) for phase, kernel in kernels.items()}
    with torch.autocast(device_type, enabled=False):
        return _PhaseConv3d.apply(x, response.to(x.dtype), stride, kernel_size, *kernels.values())
