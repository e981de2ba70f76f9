"""Convolution on blocks equals ``conv3d(where(mask, x, fill)) * mask``: values, gradients, gradcheck."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from nnunetv2_hyspark.geometry import multiply
from nnunetv2_hyspark.masking import upsample_mask
from nnunetv2_hyspark.sparse import BlockLayout, DenseMaskLayout
from nnunetv2_hyspark.sparse.convolution import adjoint_weight, submanifold_conv3d
from nnunetv2_hyspark.sparse.halo import attach_halo, halo_table, neighbour_blocks
from nnunetv2_hyspark.sparse.normalization import visible_mean

GRIDS = [(1, 2, 3), (3, 3, 3), (2, 5, 1), (1, 1, 1)]
BLOCKS = [(1, 1, 1), (2, 2, 2), (4, 4, 4), (1, 4, 4), (2, 4, 1), (3, 2, 5)]
KERNELS = [(1, 1, 1), (3, 3, 3), (5, 5, 5), (7, 7, 7), (1, 3, 3), (3, 1, 5), (1, 1, 7)]
CHANNELS = [(1, 1, 1), (1, 3, 1), (3, 2, 1), (4, 4, 4), (4, 8, 4), (4, 6, 2), (6, 3, 3)]  # in, out, groups

HIDDEN = ["zero", "mean"]

ONE_LAYOUT = {"batch_size": 2, "grid": (2, 3, 2), "block": (2, 4, 2), "ratio": 0.6, "seed": 3}


def fill_in(dense, mask, hidden):
    """The map that the convolution is meant to see: masked voxels are zero, or the mean of their sample's visible
    ones, a constant."""
    if hidden == "zero":
        return dense * mask
    filled = torch.empty_like(dense)
    for b, sample in enumerate(dense):
        for c, channel in enumerate(sample):
            mean = channel.detach()[mask[b, 0]].mean()
            filled[b, c] = torch.where(mask[b, 0], channel, mean)
    return filled


def compare(
    case, kernel, channels, stride, bias, bernoulli_mask, values, assert_close, dtype=torch.float64, hidden="zero"
):
    """Both layouts and plain torch: forward, and gradients of input, weight and bias."""
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    (inputs, outputs, groups), grid, block = channels, case["grid"], case["block"]
    visible = bernoulli_mask(case["batch_size"], grid, case["ratio"], case["seed"])
    dense = values(case["batch_size"], inputs, *multiply(grid, block), seed=case["seed"], dtype=dtype).requires_grad_()
    weight = values(outputs, inputs // groups, *kernel, seed=1, dtype=dtype).requires_grad_()
    offset = values(outputs, seed=2, dtype=dtype).requires_grad_() if bias else None
    small = tuple(s // t for s, t in zip(block, stride))
    mask_in, mask_out = upsample_mask(visible, block), upsample_mask(visible, small)
    padding = tuple(k // 2 for k in kernel)
    expected = F.conv3d(fill_in(dense, mask_in, hidden), weight, offset, stride, padding, groups=groups) * mask_out
    leaves = [leaf for leaf in (dense, weight, offset) if leaf is not None]
    cotangent = values(*expected.shape, seed=4, dtype=dtype)
    wanted = torch.autograd.grad((expected * cotangent).sum(), leaves)
    for kind in (BlockLayout, DenseMaskLayout):
        layout = kind(visible, hidden)
        out = layout.scatter(layout.conv3d(layout.gather(dense), weight, offset, stride, groups))
        assert_close(out, expected, tolerance)
        for ours, theirs in zip(torch.autograd.grad((out * cotangent).sum(), leaves), wanted):
            assert_close(ours, theirs, 10 * tolerance)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_blocks_equal_dense_then_mask(data, bernoulli_mask, values, assert_close):
    """Any mask, grid, block, kernel (also wider than a block), groups, bias and stride."""
    case = {
        "batch_size": data.draw(st.sampled_from([1, 5])),
        "grid": data.draw(st.sampled_from(GRIDS)),
        "block": data.draw(st.sampled_from(BLOCKS)),
        "ratio": data.draw(st.floats(0.01, 0.99)),
        "seed": data.draw(st.integers(0, 10**6)),
    }
    stride = tuple(data.draw(st.sampled_from([t for t in (1, 2) if s % t == 0])) for s in case["block"])
    compare(
        case, data.draw(st.sampled_from(KERNELS)), data.draw(st.sampled_from(CHANNELS)), stride,
        data.draw(st.booleans()), bernoulli_mask, values, assert_close, hidden=data.draw(st.sampled_from(HIDDEN)),
    )


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 2)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_and_stride(kernel, stride, hidden, bernoulli_mask, values, assert_close):
    compare(ONE_LAYOUT, kernel, (4, 6, 2), stride, True, bernoulli_mask, values, assert_close, hidden=hidden)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("channels", CHANNELS)
def test_every_grouping(channels, bias, bernoulli_mask, values, assert_close):
    compare(ONE_LAYOUT, (3, 3, 3), channels, (1, 1, 1), bias, bernoulli_mask, values, assert_close)


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("channels", [(3, 2, 1), (4, 4, 4)])
def test_float32(channels, hidden, bernoulli_mask, values, assert_close):
    compare(
        ONE_LAYOUT, (3, 3, 3), channels, (1, 1, 1), True, bernoulli_mask, values, assert_close, dtype=torch.float32,
        hidden=hidden,
    )


@pytest.mark.parametrize("visible_cells", [[0], [0, 1, 2, 3, 4, 5], [0, 5]])
def test_extreme_masks(visible_cells, values, assert_close):
    """One cell, all cells, two that touch only at a corner."""
    visible = torch.zeros(1, 1, 2, 3, dtype=torch.bool)
    visible.view(-1)[visible_cells] = True
    dense, weight = values(1, 2, 2, 4, 6), values(3, 2, 3, 3, 3, seed=1)
    layout, mask = BlockLayout(visible), upsample_mask(visible, (2, 2, 2))
    out = layout.scatter(layout.conv3d(layout.gather(dense), weight, None, (1, 1, 1), 1))
    assert_close(out, F.conv3d(dense * mask, weight, padding=1) * mask)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("channels", [(2, 3, 1), (2, 2, 2), (4, 2, 2)])
@pytest.mark.parametrize("kernel, stride", [((3, 3, 3), (1, 1, 1)), ((1, 3, 5), (1, 1, 1)), ((3, 3, 3), (1, 2, 2))])
def test_gradcheck(kernel, stride, channels, bias, bernoulli_mask, values):
    inputs, outputs, groups = channels
    layout = BlockLayout(bernoulli_mask(2, (1, 2, 2), 0.5, 1))
    blocks = layout.gather(values(2, inputs, 1, 4, 4)).detach().requires_grad_()
    weight = values(outputs, inputs // groups, *kernel, seed=1).requires_grad_()
    offset = values(outputs, seed=2).requires_grad_() if bias else None

    def convolve(*leaves):
        return layout.conv3d(leaves[0], leaves[1], leaves[2] if bias else None, stride, groups)

    leaves = [blocks, weight, offset] if bias else [blocks, weight]
    assert torch.autograd.gradcheck(convolve, leaves, fast_mode=False)


@pytest.mark.parametrize("needed", ["input", "weight", "bias", "weight and bias", "input and bias"])
def test_partial_gradients(needed, bernoulli_mask, values, assert_close):
    """Frozen leaves are skipped, the others keep their gradients."""
    layout = BlockLayout(bernoulli_mask(2, (2, 2, 2), 0.5, 1))
    leaves = {
        "input": layout.gather(values(2, 3, 4, 4, 4)),
        "weight": values(4, 3, 3, 3, 3, seed=1),
        "bias": values(4, seed=2),
    }

    def run(names):
        tensors = {name: leaf.detach().requires_grad_(name in names) for name, leaf in leaves.items()}
        layout.conv3d(tensors["input"], tensors["weight"], tensors["bias"], (1, 1, 1), 1).square().sum().backward()
        return {name: tensor.grad for name, tensor in tensors.items()}

    everything, some = run(list(leaves)), run(needed.split(" and "))
    for name in leaves:
        if name in needed:
            assert_close(some[name], everything[name])
        else:
            assert some[name] is None


@pytest.mark.parametrize("groups, outputs, inputs", [(1, 3, 2), (2, 4, 6), (4, 4, 4), (4, 8, 4)])
def test_adjoint_weight(groups, outputs, inputs, values, assert_close):
    """A convolution with it is the transposed convolution; doing it twice gives the kernel back."""
    weight = values(outputs, inputs // groups, 3, 1, 5)
    x = values(2, outputs, 4, 3, 5, seed=1)
    flipped = adjoint_weight(weight, groups)
    ours = F.conv3d(x, flipped, padding=(1, 0, 2), groups=groups)
    assert_close(ours, F.conv_transpose3d(x, weight, padding=(1, 0, 2), groups=groups))
    assert torch.equal(adjoint_weight(flipped, groups), weight)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("radius", [(1, 1, 1), (0, 1, 2), (3, 0, 3)])
def test_halo_is_a_window_of_the_masked_image(grid, block, radius, bernoulli_mask, values):
    """Also where the radius is larger than the block."""
    visible = bernoulli_mask(2, grid, 0.4, 5)
    layout = BlockLayout(visible)
    dense = values(2, 2, *multiply(grid, block))
    padded = F.pad(dense * upsample_mask(visible, block), [r for edge in reversed(radius) for r in (edge, edge)])
    table = halo_table(layout.cells, 2, grid, block, radius)
    halos = attach_halo(layout.gather(dense), table)
    assert table.padded == tuple(s + 2 * r for s, r in zip(block, radius))
    for halo, (b, *cell) in zip(halos, layout.cells.tolist()):
        first = [c * s for c, s in zip(cell, block)]
        window = padded[(b, slice(None), *(slice(f, f + p) for f, p in zip(first, table.padded)))]
        assert torch.equal(halo, window)


def test_neighbour_blocks(bernoulli_mask):
    visible = bernoulli_mask(3, (2, 3, 4), 0.5, 2)
    cells = visible.nonzero()
    index = {tuple(cell): n for n, cell in enumerate(cells.tolist())}
    table = neighbour_blocks(cells, 3, (2, 3, 4), (1, 0, 2))
    assert table.shape == (len(cells), 3, 1, 5)
    for n, (b, i, j, k) in enumerate(cells.tolist()):
        for di in (-1, 0, 1):
            for dk in (-2, -1, 0, 1, 2):
                assert table[n, di + 1, 0, dk + 2] == index.get((b, i + di, j, k + dk), -1)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("radius", [(1, 1, 1), (0, 1, 2), (3, 0, 3)])
def test_halo_tells_masked_voxels_from_those_outside(grid, radius, bernoulli_mask, values):
    block, visible, fill = (2, 4, 1), bernoulli_mask(2, grid, 0.4, 5), values(2, 3, seed=1)
    layout = BlockLayout(visible, "mean")
    dense = values(2, 3, *multiply(grid, block))
    filled = torch.where(upsample_mask(visible, block), dense, fill[:, :, None, None, None])
    padded = F.pad(filled, [r for edge in reversed(radius) for r in (edge, edge)])
    table = layout.halo(block, radius)
    halos = attach_halo(layout.gather(dense), table, fill)
    for halo, (b, *cell) in zip(halos, layout.cells.tolist()):
        first = [c * s for c, s in zip(cell, block)]
        window = padded[(b, slice(None), *(slice(f, f + p) for f, p in zip(first, table.padded)))]
        assert torch.equal(halo, window)


@pytest.mark.parametrize("layout", [BlockLayout, DenseMaskLayout])
def test_unknown_fill_is_refused(layout):
    with pytest.raises(ValueError, match="hidden is 'nearest'; expected 'zero' or 'mean'"):
        layout(torch.ones(1, 2, 2, 2, dtype=torch.bool), "nearest")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_visible_mean(dtype, bernoulli_mask, values):
    """Over all visible voxels of a sample, in float32 at least; a large offset does not drown in half precision."""
    visible = bernoulli_mask(3, (2, 3, 2), 0.5, 4)
    layout = BlockLayout(visible)
    blocks = (layout.gather(values(3, 5, 4, 12, 8)) + 100).to(dtype)
    means = visible_mean(blocks, layout.sample, 3)
    assert means.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for b in range(3):
        expected = blocks[layout.sample == b].double().mean((0, 2, 3, 4))
        torch.testing.assert_close(means[b].double(), expected, rtol=1e-6, atol=0)


def test_halo_ignores_non_finite_neighbours():
    """Empty halo voxels are written, not multiplied by zero: NaN in the first block does not leak through them."""
    visible = torch.tensor([True, False, True]).view(1, 1, 1, 3)
    layout = BlockLayout(visible)
    blocks = torch.ones(2, 1, 2, 2, 2)
    blocks[0] = float("nan")
    out = layout.conv3d(blocks, torch.ones(1, 1, 3, 3, 3), None, (1, 1, 1), 1)
    assert out[0].isnan().all()
    assert (out[1] == 8).all()


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("kernel", [(1, 1, 1), (3, 3, 3)])
def test_autocast(kernel, stride, hidden, bernoulli_mask, values):
    """Computes in bfloat16; gradients arrive in the parameters' own type."""
    layout = BlockLayout(bernoulli_mask(2, (2, 2, 2), 0.5, 1), hidden)
    blocks = layout.gather(values(2, 3, 4, 4, 4, dtype=torch.float32)).requires_grad_()
    weight = values(4, 3, *kernel, seed=1, dtype=torch.float32).requires_grad_()
    bias = values(4, seed=2, dtype=torch.float32).requires_grad_()

    def run():
        out = layout.conv3d(blocks, weight, bias, stride, 1)
        return out, torch.autograd.grad(out.float().square().sum(), (blocks, weight, bias))

    exact, exact_gradients = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, gradients = run()
    assert out.dtype == torch.bfloat16
    for ours, theirs in [(out, exact), *zip(gradients, exact_gradients)]:
        assert (ours.float() - theirs).norm() < 0.02 * theirs.norm()
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_no_table_means_one_by_one(values, assert_close):
    blocks, weight = values(5, 4, 2, 2, 2), values(6, 2, 1, 1, 1, seed=1)
    assert_close(submanifold_conv3d(blocks, weight, None, None, groups=2), F.conv3d(blocks, weight, groups=2))
