"""Convolution on blocks equals dense-then-mask, or a loop over cells: values, gradients, gradcheck."""
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from nnunetv2_hyspark.geometry import multiply
from nnunetv2_hyspark.masking import upsample_mask
from nnunetv2_hyspark.sparse import BlockLayout, DenseMaskLayout
from nnunetv2_hyspark.sparse.convolution import adjoint_weight, submanifold_conv3d
from nnunetv2_hyspark.sparse.halo import attach_halo, fold_halo, halo_table, neighbour_blocks

GRIDS = [(1, 2, 3), (3, 3, 3), (2, 5, 1), (1, 1, 1)]
BLOCKS = [(1, 1, 1), (2, 2, 2), (4, 4, 4), (1, 4, 4), (2, 4, 1), (3, 2, 5)]
KERNELS = [(1, 1, 1), (3, 3, 3), (5, 5, 5), (7, 7, 7), (1, 3, 3), (3, 1, 5), (1, 1, 7)]
CHANNELS = [(1, 1, 1), (1, 3, 1), (3, 2, 1), (4, 4, 4), (4, 8, 4), (4, 6, 2), (6, 3, 3)]  # in, out, groups

HIDDEN = ["zero", "nearest"]

ONE_LAYOUT = {"batch_size": 2, "grid": (2, 3, 2), "block": (2, 4, 2), "ratio": 0.6, "seed": 3}


def convolve_cell_by_cell(dense, visible, block, weight, offset, stride, groups):
    """Every visible cell in the middle of a canvas on which hidden voxels are the cell's nearest, voxel by voxel."""
    reach = [k // 2 for k in weight.shape[2:]]
    size = dense.shape[2:]
    out = torch.zeros(len(dense), len(weight), *(s // t for s, t in zip(size, stride)), dtype=dense.dtype)
    for b, *cell in visible.nonzero().tolist():
        low = [c * s for c, s in zip(cell, block)]
        window = torch.zeros(dense.shape[1], *(s + 2 * r for s, r in zip(block, reach)), dtype=dense.dtype)
        for place in itertools.product(*(range(s + 2 * r) for s, r in zip(block, reach))):
            voxel = [start + p - r for start, p, r in zip(low, place, reach)]
            if any(v < 0 or v >= edge for v, edge in zip(voxel, size)):
                continue
            if visible[(b, *(v // s for v, s in zip(voxel, block)))]:
                window[(slice(None), *place)] = dense[(b, slice(None), *voxel)]
            else:
                nearest = [min(max(v, start), start + s - 1) for v, start, s in zip(voxel, low, block)]
                window[(slice(None), *place)] = dense[(b, slice(None), *nearest)]
        convolved = F.conv3d(window[None], weight, offset, stride, groups=groups)[0]
        place = tuple(slice(start // t, (start + s) // t) for start, s, t in zip(low, block, stride))
        out[(b, slice(None), *place)] = convolved
    return out


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
    if hidden == "zero":
        expected = F.conv3d(dense * mask_in, weight, offset, stride, padding, groups=groups) * mask_out
    else:
        expected = convolve_cell_by_cell(dense, visible, block, weight, offset, stride, groups)
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
        data.draw(st.booleans()), bernoulli_mask, values, assert_close,
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_blocks_equal_a_loop_over_cells(data, bernoulli_mask, values, assert_close):
    """The same where the nearest visible voxel stands for hidden ones."""
    case = {
        "batch_size": 2,
        "grid": data.draw(st.sampled_from([(1, 2, 3), (2, 2, 2), (1, 1, 1)])),
        "block": data.draw(st.sampled_from([(1, 1, 1), (2, 2, 2), (1, 4, 2), (3, 2, 1)])),
        "ratio": data.draw(st.floats(0.2, 0.9)),
        "seed": data.draw(st.integers(0, 10**6)),
    }
    stride = tuple(data.draw(st.sampled_from([t for t in (1, 2) if s % t == 0])) for s in case["block"])
    compare(
        case, data.draw(st.sampled_from([(3, 3, 3), (1, 3, 5)])), data.draw(st.sampled_from(CHANNELS)), stride,
        data.draw(st.booleans()), bernoulli_mask, values, assert_close, hidden="nearest",
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
@pytest.mark.parametrize("hidden", HIDDEN)
def test_gradcheck(kernel, stride, channels, bias, hidden, bernoulli_mask, values):
    inputs, outputs, groups = channels
    layout = BlockLayout(bernoulli_mask(2, (1, 2, 2), 0.5, 1), hidden)
    blocks = layout.gather(values(2, inputs, 1, 4, 4)).detach().requires_grad_()
    weight = values(outputs, inputs // groups, *kernel, seed=1).requires_grad_()
    offset = values(outputs, seed=2).requires_grad_() if bias else None

    def convolve(*leaves):
        return layout.conv3d(leaves[0], leaves[1], leaves[2] if bias else None, stride, groups)

    leaves = [blocks, weight, offset] if bias else [blocks, weight]
    assert torch.autograd.gradcheck(convolve, leaves, fast_mode=False)


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("needed", ["input", "weight", "bias", "weight and bias", "input and bias"])
def test_partial_gradients(needed, hidden, bernoulli_mask, values, assert_close):
    """Frozen leaves are skipped, the others keep their gradients."""
    layout = BlockLayout(bernoulli_mask(2, (2, 2, 2), 0.5, 1), hidden)
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
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("radius", [(1, 1, 1), (0, 1, 2), (3, 0, 3)])
def test_folding_is_the_adjoint_of_attaching(grid, radius, hidden, bernoulli_mask, values, assert_close):
    """<attach(x), y> = <x, fold(y)>, for any table."""
    block = (2, 4, 1)
    layout = BlockLayout(bernoulli_mask(2, grid, 0.4, 5), hidden)
    table = layout.halo(block, radius)
    blocks = layout.gather(values(2, 3, *multiply(grid, block)))
    padded = values(len(blocks), 3, *table.padded, seed=1)
    folded = fold_halo(padded, table, block)
    assert folded.is_contiguous(memory_format=torch.channels_last_3d)
    assert_close((attach_halo(blocks, table) * padded).sum(), (blocks * folded).sum())


def test_folding_sums_half_precision_in_single(values):
    """A voxel that stands for many hidden ones gets the sum of many gradients."""
    visible = torch.zeros(1, 3, 3, 3, dtype=torch.bool)
    visible[0, 1, 1, 1] = True
    table = BlockLayout(visible, "nearest").halo((1, 1, 1), (3, 3, 3))
    gradient = (values(1, 1, 7, 7, 7) + 4).to(torch.bfloat16)
    gradient[0, 0, :2], gradient[0, 0, -2:] = 0, 0
    folded = fold_halo(gradient, table, (1, 1, 1))
    seen = gradient[:, :, 2:5, 2:5, 2:5].float().sum()
    assert folded.dtype == torch.bfloat16 and folded.item() == seen.to(torch.bfloat16).item()


@pytest.mark.parametrize("layout", [BlockLayout, DenseMaskLayout])
def test_nothing_hidden_is_an_ordinary_convolution(layout, values, assert_close):
    """Then nothing stands for anything: the border of the volume is zero, as in fine-tuning."""
    dense, weight = values(2, 3, 4, 6, 4), values(5, 3, 3, 3, 3, seed=1)
    laid = layout(torch.ones(2, 2, 3, 2, dtype=torch.bool), "nearest")
    out = laid.scatter(laid.conv3d(laid.gather(dense), weight, None, (1, 1, 1), 1))
    assert_close(out, F.conv3d(dense, weight, padding=1))


@pytest.mark.parametrize("layout", [BlockLayout, DenseMaskLayout])
def test_constants_stay_constant_beside_hidden_cells(layout, assert_close):
    """An averaging kernel finds the same everywhere, but at the border of the volume."""
    visible = torch.zeros(1, 3, 3, 3, dtype=torch.bool)
    visible[0, 1, 1, 1] = True
    laid = layout(visible, "nearest")
    image = torch.full((1, 1, 6, 6, 6), 7.0, dtype=torch.float64)
    out = laid.gather(laid.scatter(laid.conv3d(laid.gather(image), torch.full((1, 1, 3, 3, 3), 1 / 27).double(), None,
                                               (1, 1, 1), 1)))
    assert_close(out[out != 0], torch.full((8,), 7.0, dtype=torch.float64), 1e-7)


@pytest.mark.parametrize("layout", [BlockLayout, DenseMaskLayout])
def test_unknown_fill_is_refused(layout):
    with pytest.raises(ValueError, match="hidden is 'mean'; expected 'zero' or 'nearest'"):
        layout(torch.ones(1, 2, 2, 2, dtype=torch.bool), "mean")


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
