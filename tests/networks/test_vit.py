"""The transformer: positions, padding, errors."""
import math

import pytest
import torch

from nnunetv2_hyspark.networks.vit import ViT, sincos_position_embedding


def reference_position(cell: tuple, width: int) -> list[float]:
    """Axis by axis; for each, sines of all wavelengths, then cosines."""
    per_axis = width // 6
    omega = [10000 ** (-i / per_axis) for i in range(per_axis)]
    parts = []
    for coordinate in cell:
        parts += [math.sin(coordinate * w) for w in omega] + [math.cos(coordinate * w) for w in omega]
    return parts


@pytest.mark.parametrize("grid", [(3, 3, 3), (1, 2, 3), (4, 1, 2)])
@pytest.mark.parametrize("width", [6, 12, 384])
def test_positions(grid, width):
    cells = [(i, j, k) for i in range(grid[0]) for j in range(grid[1]) for k in range(grid[2])]
    ours = sincos_position_embedding(torch.arange(len(cells)), grid, width)
    expected = torch.tensor([reference_position(cell, width) for cell in cells], dtype=torch.float64)
    assert ours.dtype == torch.float32 and ours.shape == (len(cells), width)
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-7)


def test_positions_do_not_depend_on_the_grid_s_size():
    """A cell keeps its position when the crop grows."""
    small = sincos_position_embedding(torch.tensor([1 * 4 + 1 * 2 + 0]), (2, 2, 2), 24)
    large = sincos_position_embedding(torch.tensor([1 * 15 + 1 * 3 + 0]), (4, 5, 3), 24)
    assert torch.equal(small, large)


def test_tokens_may_come_in_any_order():
    torch.manual_seed(0)
    vit = ViT(24, 2, 4).double()
    tokens, cell = torch.randn(1, 6, 24, dtype=torch.float64), torch.tensor([[0, 3, 4, 7, 9, 11]])
    order = torch.randperm(6)
    torch.testing.assert_close(
        vit(tokens[:, order], cell[:, order], (2, 2, 3)), vit(tokens, cell, (2, 2, 3))[:, order], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("garbage", [0.0, 1e3])
def test_padding_is_not_attended_to(fused, garbage):
    """With timm's fused attention and without (TIMM_FUSED_ATTN=0), a padded token list equals the short one."""
    torch.manual_seed(0)
    vit = ViT(24, 2, 4).double()
    for block in vit.blocks:
        block.attn.fused_attn = fused
    tokens, cell = torch.randn(2, 5, 24, dtype=torch.float64), torch.tensor([[0, 3, 4, 7, 9], [1, 2, 5, 0, 0]])
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    tokens[padding] = garbage
    tokens.requires_grad_()
    out = vit(tokens, cell, (2, 2, 3), padding)
    short = vit(tokens[1:, :3], cell[1:, :3], (2, 2, 3))
    torch.testing.assert_close(out[1:, :3], short, rtol=0, atol=1e-12)
    torch.testing.assert_close(out[:1], vit(tokens[:1], cell[:1], (2, 2, 3)), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(out[1, :3].square().sum(), tokens)
    assert torch.equal(gradient[1, 3:], torch.zeros(2, 24, dtype=torch.float64))
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_padding_under_autocast(dtype):
    torch.manual_seed(0)
    vit, tokens = ViT(24, 1, 4), torch.randn(2, 5, 24)
    cell, padding = torch.arange(5).expand(2, 5), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    exact = vit(tokens, cell, (1, 1, 5), padding)
    with torch.autocast("cpu", dtype=dtype):
        half = vit(tokens, cell, (1, 1, 5), padding)
    torch.testing.assert_close(half.float(), exact, rtol=0, atol=0.05)


@pytest.mark.parametrize("width, heads", [(8, 2), (384, 7), (10, 5)])
def test_width_must_suit_positions_and_heads(width, heads):
    with pytest.raises(ValueError, match=f"the junction is {width} channels wide with {heads} heads"):
        ViT(width, 1, heads)


def test_positions_need_a_multiple_of_six():
    with pytest.raises(ValueError, match="need a multiple of 6"):
        sincos_position_embedding(torch.arange(3), (1, 1, 3), 8)
