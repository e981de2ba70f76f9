"""Who computes submanifold convolutions: one function with one signature, several ways, one reference.

``torch`` is the reference, :func:`nnunetv2_hyspark.sparse.convolution.submanifold_conv3d`; it runs everywhere.
``gathered`` takes matrix products over pairs of voxels for small blocks, ``triton`` computes depthwise convolutions on
CUDA without copying halos; both leave the rest to the reference. ``auto`` is what measured best on the kind of device.
A backend other than the reference is compared with it on the machine where it is to run, values and gradients, before
it is trusted.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from ..geometry import as_size3, volume
from ..precision import exact_float32
from .convolution import submanifold_conv3d
from .gathered import gathered_conv3d
from .halo import HaloTable, halo_table

BACKENDS = ("auto", "torch", "gathered", "triton")

MEASURED = {"cpu": "gathered"}
"""The fastest backend by kind of device, as far as measured: no GPU has been, so it is the reference there."""

GATHERED_VOXELS = 16
"""Largest block for which gathered products are no slower than a convolution of blocks with halos on a CPU
(docs/benchmarks.md): up to twice as fast with 8 voxels or fewer, level with 16, slower with 32."""

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest difference over largest value, by precision."""


class Convolution(Protocol):
    """A submanifold convolution; see :func:`nnunetv2_hyspark.sparse.convolution.submanifold_conv3d`."""

    def __call__(
        self,
        blocks: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        table: HaloTable | None,
        groups: int = 1,
        stride: tuple[int, int, int] = (1, 1, 1),
    ) -> torch.Tensor: ...


def gathered_where_small(
    blocks: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    table: HaloTable | None,
    groups: int = 1,
    stride: tuple[int, int, int] = (1, 1, 1),
) -> torch.Tensor:
    """:func:`nnunetv2_hyspark.sparse.convolution.submanifold_conv3d`, as gathered products where blocks are small.

    Left to the reference are larger blocks, groups, strides, tables that put something in the place of hidden
    neighbours, and whatever is compiled, since the number of pairs depends on the mask.
    """
    serves = (
        table is not None
        and table.symmetric
        and groups == 1
        and stride == (1, 1, 1)
        and volume(as_size3(blocks.shape[2:])) <= GATHERED_VOXELS
        and not torch.is_autocast_enabled(blocks.device.type)
        and not torch.compiler.is_compiling()
    )
    if table is None or not serves:
        return submanifold_conv3d(blocks, weight, bias, table, groups, stride)
    return gathered_conv3d(blocks, weight, bias, table)


def load_backend(name: str) -> Convolution:
    """The convolution of a backend.

    Raises:
        ValueError: for an unknown name.
        ImportError: if what the backend needs is not installed.
    """
    if name == "torch":
        return submanifold_conv3d
    if name == "gathered":
        return gathered_where_small
    if name == "triton":
        return importlib.import_module(f"{__package__}.triton_depthwise").triton_conv3d
    raise ValueError(f"the backend is {name!r}; expected one of {', '.join(BACKENDS)}.")


def choose_backend(name: str, device: torch.device, warn: Callable[[str], object]) -> Convolution:
    """The convolution to use on a device.

    Args:
        name: of :data:`BACKENDS`; ``"auto"`` takes that of :data:`MEASURED`.
        device: where it will run.
        warn: is told, in a sentence, why the reference is taken instead of what was asked for.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"the backend is {name!r}; expected one of {', '.join(BACKENDS)}.")
    if name == "auto":
        name = MEASURED.get(device.type, "torch")
    if name == "torch":
        return submanifold_conv3d
    try:
        convolution = load_backend(name)
        problem = disagreement(convolution, device)
    except Exception as error:  # whatever a compiler or driver on some machine may raise
        problem = f"it failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    if problem is None:
        return convolution
    warn(f"backend {name} is not used on {device}, PyTorch's convolutions are: {problem}.")
    return submanifold_conv3d


def _cases(device: torch.device) -> Iterator[tuple[HaloTable, tuple[int, ...], tuple[int, ...], int]]:
    """Halo tables on a mask with holes, with shapes of blocks ``(n, C, s0, s1, s2)`` and weights, and groups."""
    generator = torch.Generator().manual_seed(0)
    visible = torch.rand(2, 3, 3, 2, generator=generator) < 0.5
    visible[:, 0, 0, 0] = True
    cells = visible.nonzero().to(device)
    for block, kernel, channels in (((4, 4, 4), (3, 3, 3), 32), ((2, 4, 2), (1, 3, 5), 20), ((1, 1, 1), (3, 3, 3), 40)):
        radius = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        table = halo_table(cells, 2, (3, 3, 2), block, radius)
        yield table, (len(cells), channels, *block), (channels, 1, *kernel), channels
        yield table, (len(cells), channels, *block), (24, channels, *kernel), 1
    if device.type != "cuda":
        return
    # more rows and channels than kernels take at a time
    table = halo_table(cells, 2, (3, 3, 2), (6, 6, 6), (1, 1, 1))
    yield table, (len(cells), 96, 6, 6, 6), (96, 1, 3, 3, 3), 96


def disagreement(convolution: Convolution, device: torch.device) -> str | None:
    """Compares values and gradients of depthwise and full convolutions with the reference, in float32 and, on CUDA, in
    half precision; returns what differs, or None."""
    generator = torch.Generator().manual_seed(1)
    dtypes = TOLERANCES if device.type == "cuda" else [torch.float32]
    for table, shape, weight_shape, groups in _cases(device):
        outputs = weight_shape[0]
        shapes = (shape, weight_shape, (outputs,), (shape[0], outputs, *shape[2:]))
        tensors = [torch.randn(s, generator=generator) for s in shapes]
        for dtype in dtypes:
            with exact_float32():
                found, wanted = (
                    _values_and_gradients(run, table, [t.to(device, kind) for t in tensors], groups)
                    for run, kind in ((convolution, dtype), (submanifold_conv3d, torch.float32))
                )
            for what, ours, theirs in zip(("values", "input", "weight", "bias"), found, wanted):
                difference = ((ours.float() - theirs).abs().max() / theirs.abs().max()).item()
                if not difference <= TOLERANCES[dtype]:
                    name = what if what == "values" else f"gradients of the {what}"
                    return (
                        f"its {name} in {str(dtype).removeprefix('torch.')} differ from theirs by {difference:.2g} for "
                        f"blocks of {shape[2:]} and kernels of {weight_shape[2:]}, expected at most {TOLERANCES[dtype]}"
                    )
    return None


def _values_and_gradients(
    convolution: Convolution, table: HaloTable, tensors: list[torch.Tensor], groups: int
) -> tuple[torch.Tensor, ...]:
    blocks, weight, bias, grad = tensors
    x = blocks.contiguous(memory_format=torch.channels_last_3d).detach().requires_grad_()
    weight, bias = weight.detach().requires_grad_(), bias.detach().requires_grad_()
    with torch.enable_grad(), torch.autocast(blocks.device.type, enabled=False):
        out = convolution(x, weight, bias, table, groups)
        return (out.detach(), *torch.autograd.grad(out, (x, weight, bias), grad))
