"""Masks and comparisons that the tests of sparse operations share."""
import pytest
import torch

from nnunetv2_hyspark.geometry import volume


def _bernoulli_mask(batch_size: int, grid: tuple, ratio: float, seed: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    visible = torch.rand(batch_size, *grid, generator=source) >= ratio
    rescue = torch.randint(volume(grid), (batch_size, 1), generator=source)
    visible.view(batch_size, -1).scatter_(1, rescue, True)
    return visible


@pytest.fixture(scope="session")
def bernoulli_mask():
    """Every cell visible on its own, so counts differ between samples; at least one cell per sample."""
    return _bernoulli_mask


@pytest.fixture(scope="session")
def values():
    """Seeded float64 noise of a shape."""

    def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

    return make


def _assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-12) -> None:
    assert ours.shape == theirs.shape
    scale = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
    assert torch.isfinite(ours).all()
    assert ((ours - theirs).abs() <= tolerance * scale).all(), (ours - theirs).abs().max().item() / scale


@pytest.fixture(scope="session")
def assert_close():
    """Largest difference over the largest value (at least one)."""
    return _assert_close
