"""Single convolutions of the encoder by every backend: what to choose on this machine, and where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from ..depthwise import depthwise_conv3d, has_fast_gradients
from ..geometry import Size3, as_size3, cumulative_strides
from ..masking import random_visible
from ..sparse import BlockLayout
from ..sparse.backends import Convolution
from ..sparse.convolution import submanifold_conv3d
from ..sparse.gathered import gathered_conv3d
from ..sparse.halo import HaloTable
from .request import PRECISIONS, Request, backend_on
from .timing import interleave

SMALL_BLOCKS: tuple[Size3, ...] = ((1, 1, 1), (2, 2, 4), (2, 4, 4))
"""Around the size up to which gathered products serve, voxels."""


@dataclass(frozen=True)
class Case:
    """One convolution of the encoder.

    Attributes:
        stage: counted from 0, the finest.
        kind: ``"full"``, from the stage's width to the next one's, or ``"depthwise"``.
        block: edges of a visible block, voxels.
        image: edges of the whole crop at this stage, voxels.
        inputs, outputs: channels.
        kernel: its edges, voxels.
    """

    stage: int
    kind: str
    block: Size3
    image: Size3
    inputs: int
    outputs: int
    kernel: Size3

    @property
    def groups(self) -> int:
        """Of the convolution."""
        return self.inputs if self.kind == "depthwise" else 1


def cases(request: Request) -> list[Case]:
    """The full and the depthwise convolution of every stage that has them, and the coarsest full one on blocks of other
    sizes too, which other plans have."""
    kwargs = request.arch_kwargs
    strides = cumulative_strides(kwargs["strides"])
    widths, kernels = kwargs["features_per_stage"], [as_size3(kernel) for kernel in kwargs["kernel_sizes"]]
    found = []
    for stage, (stride, narrow, wide) in enumerate(zip(strides, widths, widths[1:])):
        block = as_size3(last // own for last, own in zip(strides[-1], stride))
        image = as_size3(edge // own for edge, own in zip(request.size, stride))
        found.append(Case(stage, "depthwise", block, image, narrow, narrow, kernels[stage]))
        found.append(Case(stage, "full", block, image, narrow, wide, kernels[stage]))
    return found + [replace(found[-1], block=block) for block in SMALL_BLOCKS if block != found[-1].block]


def _gathered(
    blocks: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, table: HaloTable | None, groups: int = 1,
    stride: Size3 = (1, 1, 1),
) -> torch.Tensor:
    """As gathered products whatever the size of the blocks, so that the limit of the backend can be seen."""
    if table is None or groups != 1:
        raise ValueError(f"gathered products of {groups} groups are asked for; expected 1, and a table.")
    return gathered_conv3d(blocks, weight, bias, table)


def _backends(case: Case, device: torch.device, triton: Convolution | None) -> dict[str, Convolution]:
    found: dict[str, Convolution] = {"torch": submanifold_conv3d}
    if case.kind == "full":
        found["gathered"] = _gathered
    elif triton is not None:
        found["triton"] = triton
    return found


def measure_convolutions(request: Request) -> list[dict[str, Any]]:
    """Forward and backward of every case by every backend on the request's mask and precision, and depthwise ones of
    whole images on CPUs with PyTorch's gradients and with ours.

    Returns:
        Per case and ``where`` (``"blocks"`` or ``"whole image"``) what was convolved, and under ``forward`` and
        ``forward_backward`` per way ``median_s`` and ``ratio_to_torch``, the median over rounds of its time over the
        reference's.
    """
    device = torch.device(request.device)
    generator = torch.Generator().manual_seed(0)
    visible = random_visible(request.batch, request.grid, request.mask_ratio, generator).to(device)
    layout = BlockLayout(visible)
    triton = None
    if device.type == "cuda":
        chosen = backend_on("triton", request.device)
        triton = None if chosen is submanifold_conv3d else chosen
    rows = []
    for case in cases(request):
        radius = (case.kernel[0] // 2, case.kernel[1] // 2, case.kernel[2] // 2)
        shape = (len(layout.cells), case.inputs, *case.block)
        table = layout.halo(case.block, radius)
        runs = {
            name: partial(_on_blocks, convolution, table, case.groups)
            for name, convolution in _backends(case, device, triton).items()
        }
        rows.append(_row(request, case, "blocks", shape, runs))
        if case.kind == "depthwise":
            shape = (request.batch, case.inputs, *case.image)
            ways: dict[str, Callable[..., torch.Tensor]] = {"torch": partial(_plain, radius, case.groups)}
            image, weight = torch.empty(shape, device=device), torch.empty(case.outputs, 1, *case.kernel, device=device)
            if has_fast_gradients(image, weight, case.groups):
                ways["own gradients"] = partial(_own_gradients, radius)
            rows.append(_row(request, case, "whole image", shape, ways))
    return rows


def _on_blocks(
    convolution: Convolution, table: HaloTable, groups: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return convolution(x, weight, bias, table, groups)


def _plain(radius: Size3, groups: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.conv3d(x, weight, bias, padding=radius, groups=groups)


def _own_gradients(radius: Size3, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return depthwise_conv3d(x, weight, bias, radius)


def _row(
    request: Request, case: Case, where: str, shape: Sequence[int], ways: Mapping[str, Callable[..., torch.Tensor]]
) -> dict[str, Any]:
    device, dtype = torch.device(request.device), PRECISIONS[request.precision]
    generator = torch.Generator().manual_seed(1)

    def parameter(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(device, dtype)

    x = parameter(*shape).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    weight = parameter(case.outputs, case.inputs // case.groups, *case.kernel).requires_grad_()
    bias = parameter(case.outputs).requires_grad_()
    grad = parameter(shape[0], case.outputs, *shape[2:]).contiguous(memory_format=torch.channels_last_3d)

    def forward(way: Callable[..., torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return way(x, weight, bias)

    def forward_backward(way: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(way(x, weight, bias), (x, weight, bias), grad)

    row: dict[str, Any] = {
        "stage": case.stage, "kind": case.kind, "where": where, "shape": list(shape), "outputs": case.outputs,
        "kernel": list(case.kernel),
    }
    for name, run in (("forward", forward), ("forward_backward", forward_backward)):
        timings = interleave({n: partial(run, way) for n, way in ways.items()}, request.repeats, 30.0, device)
        row[name] = {
            way: {"median_s": seconds, "ratio_to_torch": timings.ratio(way, "torch")}
            for way, seconds in timings.medians().items()
        }
    return row
