"""Junction masks: counts, uniformity, seeds, errors, up-sampling."""
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_hyspark.geometry import volume
from nnunetv2_hyspark.masking import count_visible, random_visible, random_visible_between, upsample_mask

GRIDS = [(6, 6, 6), (1, 2, 3), (3, 3, 3), (2, 5, 1)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "grid, ratio, expected",
    [((6, 6, 6), 0.75, 54), ((3, 3, 3), 0.75, 7), ((3, 3, 3), 0.6, 11), ((1, 2, 3), 0.5, 3), ((1, 1, 2), 0.5, 1)],
)
def test_count_visible(grid, ratio, expected):
    assert count_visible(grid, ratio) == expected


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
def test_ratio_out_of_range(ratio):
    with pytest.raises(ValueError, match=f"mask_ratio is {ratio}; expected a fraction above 0 and below 1"):
        count_visible((3, 3, 3), ratio)


@pytest.mark.parametrize("ratio, state", [(0.999, "no visible"), (0.001, "no masked")])
@pytest.mark.parametrize("grid", GRIDS)
def test_ratio_too_extreme_for_the_grid(grid, ratio, state):
    """The error names ratio, grid and a range, and both ends of that range work."""
    with pytest.raises(ValueError, match=f"mask_ratio {ratio} leaves {state} cell on a grid of ") as caught:
        count_visible(grid, ratio)
    assert "x".join(map(str, grid)) in str(caught.value)
    low, high = map(float, re.search(r"between ([\d.]+) and ([\d.]+)", str(caught.value)).groups())
    assert count_visible(grid, low) == volume(grid) - 1
    assert count_visible(grid, high) == 1


def test_a_single_cell_can_not_be_masked():
    with pytest.raises(ValueError, match="use a larger patch") as caught:
        count_visible((1, 1, 1), 0.5)
    assert "between" not in str(caught.value)


@given(st.sampled_from(GRIDS), st.floats(0.01, 0.99), st.integers(1, 5), st.integers(0, 2**31))
def test_random_visible_has_exact_counts(grid, ratio, batch_size, seed):
    expected = round((1 - ratio) * volume(grid))
    if expected in (0, volume(grid)):
        with pytest.raises(ValueError, match="leaves no"):
            random_visible(batch_size, grid, ratio, generator(seed))
        return
    visible = random_visible(batch_size, grid, ratio, generator(seed))
    assert visible.dtype == torch.bool and visible.shape == (batch_size, *grid)
    assert visible.flatten(1).sum(1).tolist() == [expected] * batch_size


def test_random_visible_is_reproducible():
    first = random_visible(4, (3, 4, 5), 0.75, generator(7))
    assert torch.equal(first, random_visible(4, (3, 4, 5), 0.75, generator(7)))
    assert not torch.equal(first, random_visible(4, (3, 4, 5), 0.75, generator(8)))


def test_random_visible_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    random_visible(2, (3, 3, 3), 0.75, generator(0))
    assert torch.equal(state, torch.get_rng_state())


def test_consecutive_draws_differ():
    """Samples of a batch, and batches of one generator, have masks of their own."""
    source = generator(0)
    draws = torch.cat([random_visible(4, (4, 4, 4), 0.75, source) for _ in range(2)]).flatten(1)
    assert len(torch.unique(draws, dim=0)) == 8


def test_random_visible_is_uniform():
    """Every cell, and every pair of cells, is visible equally often (chi-square, far in the tail)."""
    n, grid = 20000, (2, 3, 2)
    visible = random_visible(n, grid, 0.75, generator(1)).flatten(1).double()
    cells, keep = volume(grid), 3
    single, pairs = visible.sum(0), (visible.T @ visible)[tuple(torch.triu_indices(cells, cells, 1))]
    for counts in (single, pairs):
        p = keep / cells if len(counts) == cells else keep * (keep - 1) / (cells * (cells - 1))
        chi_square = ((counts - n * p) ** 2 / (n * p * (1 - p))).sum().item()
        assert chi_square < len(counts) + 5 * (2 * len(counts)) ** 0.5
        assert ((counts - n * p).abs() < 5 * (n * p * (1 - p)) ** 0.5).all()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("factor", [(1, 1, 1), (2, 2, 2), (1, 2, 4), (3, 1, 1)])
def test_upsample_mask(grid, factor):
    visible = torch.rand(3, *grid, generator=generator(0)) < 0.5
    expected = np.stack([np.kron(sample.numpy(), np.ones(factor, dtype=bool)) for sample in visible])[:, None]
    assert np.array_equal(upsample_mask(visible, factor).numpy(), expected)


@given(seed=st.integers(0, 2**31), low=st.floats(0.2, 0.8), more=st.floats(0, 0.15))
def test_ratios_between_two_stay_between_them(seed, low, more):
    grid = (3, 4, 3)
    visible = random_visible_between(5, grid, low, low + more, generator(seed))
    assert visible.shape == (5, *grid) and visible.dtype == torch.bool
    counts = visible.flatten(1).sum(1)
    assert ((counts >= count_visible(grid, low + more)) & (counts <= count_visible(grid, low))).all()
    assert torch.equal(visible, random_visible_between(5, grid, low, low + more, generator(seed)))


def test_ratios_between_two_are_spread_and_cells_are_uniform():
    visible = random_visible_between(20_000, (2, 2, 3), 0.25, 0.75, generator(0))
    counts = visible.flatten(1).sum(1)
    assert counts.float().mean() == pytest.approx(6, abs=0.05)
    assert set(counts.tolist()) == set(range(3, 10))
    assert (visible.float().mean(0) - 0.5).abs().max() < 0.02
    with pytest.raises(ValueError, match="mask_ratio 0.001 leaves no masked"):
        random_visible_between(1, (2, 2, 3), 0.001, 0.75, generator(0))
