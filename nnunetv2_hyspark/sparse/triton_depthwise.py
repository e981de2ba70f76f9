"""Depthwise submanifold convolution that reads its neighbours where they lie, for CUDA.

The reference gathers every block with its halo into a new tensor and convolves that: for a 3x3x3 kernel on blocks of 4
it writes and reads 3.4 times the voxels. Here one Triton kernel looks up each neighbour's row in the halo table and
reads it in place. Needs the package ``triton``, which PyTorch's CUDA builds bring along; imported only when it is asked
for. Sums are taken in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..geometry import Size3, as_size3
from .convolution import submanifold_conv3d
from .halo import HaloTable

ROWS = 32
"""Voxels that one program computes at a time."""

SPLITS = 128
"""Parts in which the gradient of the weight is summed; their sums are added in a fixed order."""


@triton.jit
def _padded_row(row, s0, s1, s2, k0, k1, k2):
    """Row of the padded blocks where a voxel's window begins."""
    k = row % s2
    j = (row // s2) % s1
    i = (row // (s2 * s1)) % s0
    n = row // (s2 * s1 * s0)
    return ((n * (s0 + k0 - 1) + i) * (s1 + k1 - 1) + j) * (s2 + k2 - 1) + k


@triton.jit
def _convolve(
    x, weight, bias, neighbours, out, rows, channels, s0, s1, s2,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_rows, in_channels = row < rows, channel < channels
    start = _padded_row(row, s0, s1, s2, K0, K1, K2)
    total = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
    # unrolled along one axis only: all taps at once take so many registers that few programs run side by side
    for a in range(K0):
        for b in range(K1):
            for c in tl.static_range(K2):
                place = start + (a * (s1 + K1 - 1) + b) * (s2 + K2 - 1) + c
                source = tl.load(neighbours + place, mask=in_rows, other=-1)
                reads = (source >= 0)[:, None] & in_channels[None, :]
                values = tl.load(x + source.to(tl.int64)[:, None] * channels + channel[None, :], mask=reads, other=0.0)
                taps = tl.load(weight + ((a * K1 + b) * K2 + c) * channels + channel, mask=in_channels, other=0.0)
                total += values.to(tl.float32) * taps.to(tl.float32)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + channel, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    target = out + row.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=in_rows[:, None] & in_channels[None, :])


@triton.jit
def _sum_weight(
    x, grad, neighbours, partial, rows, channels, s0, s1, s2, tap_count, rows_per_split,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    split, tap = tl.program_id(0), tl.program_id(1)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    in_channels = channel < channels
    c = tap % K2
    b = (tap // K2) % K1
    a = tap // (K2 * K1)
    offset = (a * (s1 + K1 - 1) + b) * (s2 + K2 - 1) + c
    total = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
    first = split * rows_per_split
    for begin in range(first, first + rows_per_split, ROWS):
        row = begin + tl.arange(0, ROWS)
        in_rows = row < rows
        place = _padded_row(row, s0, s1, s2, K0, K1, K2) + offset
        source = tl.load(neighbours + place, mask=in_rows, other=-1)
        reads = (source >= 0)[:, None] & in_channels[None, :]
        values = tl.load(x + source.to(tl.int64)[:, None] * channels + channel[None, :], mask=reads, other=0.0)
        wanted = in_rows[:, None] & in_channels[None, :]
        grads = tl.load(grad + row.to(tl.int64)[:, None] * channels + channel[None, :], mask=wanted, other=0.0)
        total += values.to(tl.float32) * grads.to(tl.float32)
    tl.store(partial + (split * tap_count + tap) * channels + channel, tl.sum(total, axis=0), mask=in_channels)


def _rows(blocks: torch.Tensor) -> torch.Tensor:
    """``(n, C, s0, s1, s2)`` as contiguous ``(n * s0 * s1 * s2, C)``; a view in channels-last memory."""
    return blocks.permute(0, 2, 3, 4, 1).reshape(-1, blocks.shape[1]).contiguous()


def _blocks(rows: torch.Tensor, block: Size3) -> torch.Tensor:
    """Inverse of :func:`_rows`."""
    return rows.view(-1, *block, rows.shape[1]).permute(0, 4, 1, 2, 3)


def _taps(weight: torch.Tensor) -> torch.Tensor:
    """``(C, 1, k0, k1, k2)`` as contiguous ``(k0 * k1 * k2, C)``."""
    return weight.flatten(1).t().contiguous()


def _channels_at_once(channels: int) -> int:
    return min(triton.next_power_of_2(channels), 64)


@torch.library.custom_op(
    "nnunetv2_hyspark::depthwise_rows", mutates_args=(),
    schema="(Tensor rows, Tensor taps, Tensor? bias, Tensor neighbours, int[] block, int[] kernel) -> Tensor",
)
def _depthwise_rows(rows, taps, bias, neighbours, block, kernel):
    """Convolves contiguous rows ``(R, C)`` with taps ``(k, C)``; an operator, which compilers do not look into."""
    out = torch.empty_like(rows)
    count, channels = rows.shape
    width = _channels_at_once(channels)
    with torch.cuda.device_of(rows):  # Triton launches on the current device
        _convolve[(triton.cdiv(count, ROWS), triton.cdiv(channels, width))](
            rows, taps, taps if bias is None else bias, neighbours, out, count, channels, *block, *kernel,
            HAS_BIAS=bias is not None, ROWS=ROWS, CHANNELS=width,
        )  # fmt: skip
    return out


@_depthwise_rows.register_fake
def _(rows, taps, bias, neighbours, block, kernel):
    return torch.empty_like(rows)


@torch.library.custom_op(
    "nnunetv2_hyspark::depthwise_taps_gradient", mutates_args=(),
    schema="(Tensor rows, Tensor grad, Tensor neighbours, int[] block, int[] kernel) -> Tensor",
)
def _taps_gradient(rows, grad, neighbours, block, kernel):
    """Gradient of the taps, ``(k, C)`` in float32."""
    count, channels = rows.shape
    tap_count = kernel[0] * kernel[1] * kernel[2]
    width = _channels_at_once(channels)
    per_split = triton.cdiv(triton.cdiv(count, ROWS), SPLITS) * ROWS
    splits = triton.cdiv(count, per_split)
    partial = torch.empty(splits, tap_count, channels, dtype=torch.float32, device=rows.device)
    with torch.cuda.device_of(rows):
        _sum_weight[(splits, tap_count, triton.cdiv(channels, width))](
            rows, grad, neighbours, partial, count, channels, *block, tap_count, per_split, *kernel,
            ROWS=ROWS, CHANNELS=width,
        )  # fmt: skip
    return partial.sum(0)


@_taps_gradient.register_fake
def _(rows, grad, neighbours, block, kernel):
    return rows.new_empty(kernel[0] * kernel[1] * kernel[2], rows.shape[1], dtype=torch.float32)


def _save(ctx, inputs, output):
    rows, taps, _, neighbours, ctx.block, ctx.kernel = inputs
    ctx.save_for_backward(rows, taps, neighbours)


def _backward(ctx, grad):
    rows, taps, neighbours = ctx.saved_tensors
    grad = grad.contiguous()
    grad_rows = grad_taps = grad_bias = None
    if ctx.needs_input_grad[0]:
        # voxels see each other or not at all: the gradient is gathered by the same table, with the kernel flipped
        grad_rows = _depthwise_rows(grad, taps.flip(0), None, neighbours, ctx.block, ctx.kernel)
    if ctx.needs_input_grad[1]:
        grad_taps = _taps_gradient(rows, grad, neighbours, ctx.block, ctx.kernel).to(taps.dtype)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.sum(0, dtype=torch.float32).to(taps.dtype)
    return grad_rows, grad_taps, grad_bias, None, None, None


_depthwise_rows.register_autograd(_backward, setup_context=_save)


def triton_conv3d(
    blocks: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    table: HaloTable | None,
    groups: int = 1,
    stride: tuple[int, int, int] = (1, 1, 1),
) -> torch.Tensor:
    """:func:`nnunetv2_hyspark.sparse.convolution.submanifold_conv3d`, with depthwise convolutions by Triton.

    What the kernels do not do is left to that function: other convolutions, strides, tables that put something in the
    place of hidden neighbours, float64. Arguments and result are the same.
    """
    serves = (
        table is not None
        and table.symmetric
        and stride == (1, 1, 1)
        and groups == blocks.shape[1] == len(weight)
        and groups > 1
        and blocks.dtype != torch.float64
    )
    if table is None or not serves:
        return submanifold_conv3d(blocks, weight, bias, table, groups, stride)
    if torch.is_autocast_enabled(blocks.device.type):
        dtype = torch.get_autocast_dtype(blocks.device.type)
        blocks, weight = blocks.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    block, kernel = as_size3(blocks.shape[2:]), as_size3(weight.shape[2:])
    rows = _depthwise_rows(_rows(blocks), _taps(weight), bias, table.neighbours, list(block), list(kernel))
    return _blocks(rows, block)
