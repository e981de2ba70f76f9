"""Times the full convolutions of the paper's encoder by spconv on the CPU beside ours: why spconv is no backend.

    pip install spconv==2.3.8
    python scripts/compare_spconv.py

One thread, 96^3 voxels, 75 % hidden, forward and backward; results are compared before they are timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from nnunetv2_hyspark.benchmark.convolutions import Case, cases
from nnunetv2_hyspark.benchmark.request import Request
from nnunetv2_hyspark.benchmark.timing import interleave
from nnunetv2_hyspark.masking import random_visible
from nnunetv2_hyspark.sparse import BlockLayout
from nnunetv2_hyspark.sparse.convolution import submanifold_conv3d


def voxel_indices(layout: BlockLayout, case: Case) -> torch.Tensor:
    """Sample and position of every visible voxel, in the order of the blocks' voxels: int32 ``(n * voxels, 4)``."""
    edges = [torch.arange(edge) for edge in case.block]
    inside = torch.stack(torch.meshgrid(*edges, indexing="ij"), -1).view(1, -1, 3)
    position = layout.cells[:, None, 1:] * torch.tensor(case.block) + inside
    sample = layout.cells[:, :1, None].expand(-1, inside.shape[1], -1)
    return torch.cat([sample, position], 2).view(-1, 4).int().contiguous()


def ways(case: Case, layout: BlockLayout, spconv: Any) -> dict[str, Callable[[], tuple[torch.Tensor, ...]]]:
    """Output, gradient of the input and of the weight as rows of voxels, by spconv and by blocks."""
    torch.manual_seed(0)
    convolution = spconv.SubMConv3d(
        case.inputs, case.outputs, case.kernel, bias=False, algo=importlib.import_module("spconv.core").ConvAlgo.Native
    )
    indices, table = voxel_indices(layout, case), layout.halo(case.block, (1, 1, 1))
    rows = torch.randn(len(indices), case.inputs, requires_grad=True)
    grad = torch.randn(len(indices), case.outputs)

    def by_spconv() -> tuple[torch.Tensor, ...]:
        sparse = spconv.SparseConvTensor(rows, indices, list(case.image), layout.batch_size)
        out = convolution(sparse).features
        return (out, *torch.autograd.grad(out, (rows, convolution.weight), grad))

    # spconv keeps weights as (O, k0, k1, k2, I)
    weight = convolution.weight.detach().permute(0, 4, 1, 2, 3).contiguous().requires_grad_()
    blocks = rows.detach().view(-1, *case.block, case.inputs).permute(0, 4, 1, 2, 3).requires_grad_()
    block_grad = grad.view(-1, *case.block, case.outputs).permute(0, 4, 1, 2, 3)

    def by_blocks() -> tuple[torch.Tensor, ...]:
        out = submanifold_conv3d(blocks, weight, None, table)
        of_blocks, of_weight = torch.autograd.grad(out, (blocks, weight), block_grad)
        as_rows = [t.permute(0, 2, 3, 4, 1).reshape(len(rows), -1) for t in (out, of_blocks)]
        return (*as_rows, of_weight.permute(0, 2, 3, 4, 1))

    return {"spconv": by_spconv, "blocks": by_blocks}


def main() -> None:
    """Prints one line per convolution."""
    spconv = importlib.import_module("spconv.pytorch")
    for name in ("cppcore", "ops"):  # it asks for CUDA's stream on the CPU too
        vars(importlib.import_module(f"spconv.pytorch.{name}"))["get_current_stream"] = lambda: 0
    torch.set_num_threads(1)
    request = Request()
    visible = random_visible(1, request.grid, request.mask_ratio, torch.Generator().manual_seed(0))
    for case in cases(request):
        if case.kind != "full":
            continue
        runs = ways(case, BlockLayout(visible), spconv)
        for ours, theirs in zip(runs["blocks"](), runs["spconv"](), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)
        timings = interleave(runs, 5, 60, torch.device("cpu"))
        seconds = timings.medians()
        print(
            f"blocks of {case.block}, {case.inputs} to {case.outputs} channels: spconv {seconds['spconv']:.3f} s, "
            f"blocks {seconds['blocks']:.3f} s, ratio {timings.ratio('spconv', 'blocks'):.2f}", flush=True,
        )


if __name__ == "__main__":
    main()
