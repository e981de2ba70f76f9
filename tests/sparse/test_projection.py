"""The sparse projection equals filling the masked voxels and convolving densely."""

from __future__ import annotations

import pytest
import torch

from nnunetv2_hyspark.sparse import BlockLayout, DenseMaskLayout
from nnunetv2_hyspark.sparse.projection import (
    half_kernel,
    project_densified,
    rims,
    sparse_projection_pays,
)

KERNELS = [(3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 1), (5, 3, 5)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("block", [(4, 4, 4), (2, 4, 3), (2, 2, 2)])
@pytest.mark.parametrize(("grid", "batch"), [((2, 3, 2), 1), ((3, 1, 2), 3), ((1, 1, 1), 1)])
@pytest.mark.parametrize("share", [0.25, 0.8])
def test_equals_the_dense_convolution(kernel, block, grid, batch, share):
    generator = torch.Generator().manual_seed(1)
    visible = torch.rand(batch, *grid, generator=generator) < share
    visible[:, 0, 0, 0] = True
    layout, reference = BlockLayout(visible), DenseMaskLayout(visible)
    size = [g * s for g, s in zip(grid, block)]

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    image, fill, weight, bias = tensor(batch, 3, *size), tensor(3), tensor(2, 3, *kernel), tensor(2)
    inputs = [image, fill, weight, bias]
    expected = reference.densified_conv3d(reference.gather(image), fill, weight, bias)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    blocks = layout.gather(image)
    placement = rims(layout.cells, layout.grid, half_kernel(weight))
    for actual in (
        project_densified(blocks, fill, weight, bias, layout.cells, placement, batch, layout.grid),
        layout.densified_conv3d(blocks, fill, weight, bias),
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
        got = torch.autograd.grad(actual, inputs, upstream, retain_graph=True)
        for ours, theirs in zip(got, wanted):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_masked_voxels_are_never_read():
    visible = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    visible[0, 0, 1, 0] = True
    image = torch.full((1, 1, 8, 8, 8), float("nan"))
    image[:, :, :4, 4:, :4] = 1.0
    layout = BlockLayout(visible)
    out = layout.densified_conv3d(layout.gather(image), torch.zeros(1), torch.ones(1, 1, 3, 3, 3), None)
    assert out.isfinite().all()
    assert (out > 0).sum() == 5 * 5 * 5


def test_large_blocks_gain_and_small_ones_do_not():
    assert sparse_projection_pays((16, 16, 16), (3, 3, 3), 0.25)
    assert not sparse_projection_pays((4, 4, 4), (3, 3, 3), 0.25)
    assert not sparse_projection_pays((16, 16, 16), (3, 3, 3), 0.75)
    assert not sparse_projection_pays((1, 1, 1), (5, 5, 5), 0.01)
