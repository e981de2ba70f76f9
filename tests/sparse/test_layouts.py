"""BlockLayout against DenseMaskLayout and against loops: everything but the convolution."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from nnunetv2_hyspark.geometry import multiply
from nnunetv2_hyspark.masking import random_visible, upsample_mask
from nnunetv2_hyspark.sparse import BlockLayout, DenseMaskLayout

GRIDS = [(1, 2, 3), (3, 3, 3), (2, 5, 1), (1, 1, 1)]
BLOCKS = [(1, 1, 1), (2, 2, 2), (4, 4, 4), (1, 4, 4), (2, 4, 1), (3, 2, 5)]


@st.composite
def layouts(draw, even: bool = False):
    """Arguments of a mask, a block shape and a channel count; the seed also draws the values."""
    return {
        "batch_size": draw(st.sampled_from([1, 2, 5])),
        "grid": draw(st.sampled_from(GRIDS)),
        "ratio": draw(st.floats(0.01, 0.99)),
        "seed": draw(st.integers(0, 10**6)),
        "block": draw(st.sampled_from([b for b in BLOCKS if not even or all(s % 2 == 0 or s == 1 for s in b)])),
        "channels": draw(st.sampled_from([1, 3])),
    }


thorough = settings(max_examples=60, deadline=None, derandomize=True)


def make(case, bernoulli_mask, values):
    """The mask, both layouts, and a dense float64 map that requires gradients."""
    visible = bernoulli_mask(case["batch_size"], case["grid"], case["ratio"], case["seed"])
    size = multiply(case["grid"], case["block"])
    dense = values(case["batch_size"], case["channels"], *size, seed=case["seed"]).requires_grad_()
    return visible, BlockLayout(visible), DenseMaskLayout(visible), dense


def gradients(output, inputs, cotangent):
    return torch.autograd.grad((output * cotangent).sum(), inputs)


@thorough
@given(case=layouts())
def test_gather_cuts_visible_cells(case, bernoulli_mask, values):
    """In the order sample, then row-major cell; nothing is changed; masked voxels get no gradient."""
    visible, layout, _, dense = make(case, bernoulli_mask, values)
    (s0, s1, s2) = case["block"]
    expected = torch.stack(
        [
            dense[b, :, i * s0 : (i + 1) * s0, j * s1 : (j + 1) * s1, k * s2 : (k + 1) * s2]
            for b, i, j, k in visible.nonzero().tolist()
        ]
    )
    blocks = layout.gather(dense)
    assert torch.equal(blocks, expected)
    assert layout.counts == visible.flatten(1).sum(1).tolist()
    (gradient,) = torch.autograd.grad(blocks.sum(), dense)
    assert torch.equal(gradient, upsample_mask(visible, case["block"]).expand_as(dense).double())


@thorough
@given(case=layouts(), filled=st.booleans())
def test_scatter_writes_visible_cells(case, filled, bernoulli_mask, values):
    """Both layouts return the same dense map, with gradients for blocks and fill."""
    visible, blocks, masked, dense = make(case, bernoulli_mask, values)
    fill = values(case["channels"], seed=1).requires_grad_() if filled else None
    mask = upsample_mask(visible, case["block"])
    background = fill[None, :, None, None, None] if filled else torch.zeros_like(dense)
    expected = torch.where(mask, dense, background)
    cotangent = values(*dense.shape, seed=2)
    inputs = [dense, fill] if filled else [dense]
    wanted = gradients(expected, inputs, cotangent)
    for layout in (blocks, masked):
        out = layout.scatter(layout.gather(dense), fill)
        assert torch.equal(out, expected)
        for ours, theirs in zip(gradients(out, inputs, cotangent), wanted):
            assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
        assert torch.equal(layout.gather(out), layout.gather(dense))


@thorough
@given(case=layouts(even=True))
def test_max_pool(case, bernoulli_mask, values, assert_close):
    visible, blocks, masked, dense = make(case, bernoulli_mask, values)
    stride = tuple(1 if s == 1 else 2 for s in case["block"])
    inside = -torch.finfo(torch.float64).max  # loses against every visible value
    pooled = F.max_pool3d(torch.where(upsample_mask(visible, case["block"]), dense, inside), stride, stride)
    smaller = tuple(s // t for s, t in zip(case["block"], stride))
    expected = torch.where(upsample_mask(visible, smaller), pooled, 0.0)
    cotangent = values(*expected.shape, seed=2)
    wanted = gradients(expected, [dense], cotangent)
    for layout in (blocks, masked):
        out = layout.scatter(layout.max_pool3d(layout.gather(dense), stride))
        assert torch.equal(out, expected)
        assert_close(gradients(out, [dense], cotangent)[0], wanted[0])


@thorough
@given(case=layouts(), affine=st.sampled_from(["none", "weight", "both"]))
def test_instance_norm(case, affine, bernoulli_mask, values, assert_close):
    """Statistics are those of a sample's visible voxels; values and gradients equal a loop over samples."""
    visible, blocks, masked, dense = make(case, bernoulli_mask, values)
    channels, eps = case["channels"], 1e-3
    weight = values(channels, seed=3).requires_grad_() if affine != "none" else None
    bias = values(channels, seed=4).requires_grad_() if affine == "both" else None
    mask = upsample_mask(visible, case["block"])
    expected = torch.zeros_like(dense)
    for b in range(len(visible)):
        for c in range(channels):
            seen = dense[b, c][mask[b, 0]]
            normalised = (seen - seen.mean()) / (seen.var(unbiased=False) + eps).sqrt()
            if weight is not None:
                normalised = normalised * weight[c]
            if bias is not None:
                normalised = normalised + bias[c]
            index = torch.zeros_like(dense, dtype=torch.bool)
            index[b, c] = mask[b, 0]
            expected = expected.masked_scatter(index, normalised)
    inputs = [t for t in (dense, weight, bias) if t is not None]
    cotangent = values(*dense.shape, seed=5)
    wanted = gradients(expected, inputs, cotangent)
    for layout in (blocks, masked):
        out = layout.scatter(layout.instance_norm(layout.gather(dense), weight, bias, eps))
        assert_close(out, expected, 1e-11)
        for ours, theirs in zip(gradients(out, inputs, cotangent), wanted):
            assert_close(ours, theirs, 1e-10)


def test_instance_norm_of_a_whole_image_is_torch_s(values):
    dense, weight, bias = values(2, 3, 4, 8, 4), values(3, seed=1), values(3, seed=2)
    layout = BlockLayout(torch.ones(2, 2, 2, 1, dtype=torch.bool))
    ours = layout.scatter(layout.instance_norm(layout.gather(dense), weight, bias, 1e-5))
    torch.testing.assert_close(ours, F.instance_norm(dense, weight=weight, bias=bias, eps=1e-5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_instance_norm_of_half_precision(dtype, values, bernoulli_mask):
    """Statistics are taken in float32 (a float16 sum of these squares overflows); the result has the input's type."""
    layout = BlockLayout(bernoulli_mask(3, (3, 3, 3), 0.5, 0))
    blocks = (layout.gather(values(3, 2, 12, 12, 12)) * 50).to(dtype)
    ours = layout.instance_norm(blocks, None, None, 1e-5)
    expected = layout.instance_norm(blocks.double(), None, None, 1e-5)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), expected, rtol=1e-2, atol=1e-2)


@thorough
@given(case=layouts())
def test_tokens(case, bernoulli_mask, values):
    """Tokens come in row-major order; padding marks the slots beyond a sample's count; the way back is exact."""
    visible, blocks, masked, dense = make({**case, "block": (1, 1, 1)}, bernoulli_mask, values)
    counts = visible.flatten(1).sum(1).tolist()
    flat = dense.flatten(2)
    cotangent = values(*dense.shape, seed=2)
    for layout in (blocks, masked):
        junction = layout.gather(dense)
        tokens, cell, padding = layout.to_tokens(junction)
        assert tokens.shape == (len(counts), max(counts), case["channels"])
        assert cell.shape == tokens.shape[:2] and cell.dtype == torch.long
        assert (padding is None) == (len(set(counts)) == 1)
        for b, count in enumerate(counts):
            where = visible[b].flatten().nonzero().squeeze(1)
            assert torch.equal(cell[b, :count], where)
            assert torch.equal(tokens[b, :count], flat[b, :, where].T)
            if padding is not None:
                assert padding[b].tolist() == [slot >= count for slot in range(max(counts))]
        back = layout.scatter(layout.from_tokens(tokens))
        assert torch.equal(back, dense * visible[:, None])
        (gradient,) = gradients(back, [dense], cotangent)
        assert torch.equal(gradient, cotangent * visible[:, None])


def test_padding_tokens_never_come_back(bernoulli_mask, values):
    """What a transformer leaves in padding slots, be it NaN, does not reach the map."""
    visible = bernoulli_mask(4, (3, 3, 3), 0.6, 0)
    layout = BlockLayout(visible)
    junction = layout.gather(values(4, 6, 3, 3, 3))
    tokens, _, padding = layout.to_tokens(junction)
    assert padding is not None and padding.any()
    assert torch.equal(layout.from_tokens(tokens.masked_fill(padding[:, :, None], float("nan"))), junction)


@pytest.mark.parametrize("filler", [1e30, float("inf"), float("nan")])
def test_masked_voxels_do_not_pass_gather(filler, bernoulli_mask, values):
    layout = BlockLayout(bernoulli_mask(2, (2, 3, 2), 0.5, 0))
    dense = values(2, 3, 4, 6, 4)
    dirty = torch.where(upsample_mask(layout.visible, (2, 2, 2)), dense, filler)
    assert torch.equal(layout.gather(dirty), layout.gather(dense))


def test_blocks_are_channels_last():
    """The layout that makes depthwise convolutions fast; see the design notes."""
    visible = random_visible(2, (2, 2, 2), 0.5, torch.Generator().manual_seed(0))
    layout = BlockLayout(visible)
    blocks = layout.gather(torch.randn(2, 5, 8, 8, 8))
    assert blocks.is_contiguous(memory_format=torch.channels_last_3d)
    assert layout.scatter(blocks).is_contiguous(memory_format=torch.channels_last_3d)


def test_halo_tables_are_made_once():
    layout = BlockLayout(torch.ones(1, 2, 2, 2, dtype=torch.bool))
    assert layout.halo((2, 2, 2), (1, 1, 1)) is layout.halo((2, 2, 2), (1, 1, 1))
    assert layout.halo((2, 2, 2), (1, 1, 1)) is not layout.halo((2, 2, 2), (0, 1, 1))


@pytest.mark.parametrize("kind", [BlockLayout, DenseMaskLayout])
@pytest.mark.parametrize(
    "visible", [torch.ones(1, 2, 2, 2), torch.ones(2, 2, 2, dtype=torch.bool), torch.ones(1, 1, 2, 2, 2).bool()]
)
def test_masks_of_another_form_are_refused(kind, visible):
    with pytest.raises(ValueError, match=r"expected torch\.bool of shape \(B, g0, g1, g2\)"):
        kind(visible)


def test_a_sample_without_visible_cells_is_refused():
    visible = torch.ones(3, 2, 2, 2, dtype=torch.bool)
    visible[1] = False
    with pytest.raises(ValueError, match="sample 1 of the batch has no visible cell.*lower the mask ratio"):
        BlockLayout(visible)


def test_maps_that_do_not_fit_the_mask_are_refused():
    layout = BlockLayout(torch.ones(2, 2, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="the map has 3 samples, the mask 2"):
        layout.gather(torch.zeros(3, 1, 4, 4, 4))
    with pytest.raises(ValueError, match=r"map of size \(4, 5, 4\) is not divisible by \(2, 2, 2\)"):
        layout.gather(torch.zeros(2, 1, 4, 5, 4))
    blocks = layout.gather(torch.zeros(2, 1, 6, 6, 6))
    with pytest.raises(ValueError, match=r"block \(3, 3, 3\) is not divisible by \(2, 2, 2\)"):
        layout.max_pool3d(blocks, (2, 2, 2))
    with pytest.raises(ValueError, match=r"block \(3, 3, 3\) is not divisible by \(2, 2, 2\)"):
        layout.conv3d(blocks, torch.zeros(1, 1, 3, 3, 3), None, (2, 2, 2), 1)
    with pytest.raises(ValueError, match="tokens need blocks of one voxel"):
        layout.to_tokens(blocks)
