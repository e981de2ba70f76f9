"""Cells, targets, loss and pictures."""
import numpy as np
import pytest
import torch

from nnunetv2_hyspark.masking import random_visible, upsample_mask
from nnunetv2_hyspark.pretext.hyspark import (
    TARGETS,
    cell_statistics,
    denormalise,
    patchify,
    reconstruction_loss,
    target_statistics,
    unpatchify,
)

SHAPES = [((2, 2, 2), (4, 4, 4), 1), ((1, 2, 3), (2, 4, 3), 2), ((3, 1, 2), (1, 2, 2), 3)]  # grid, cell, channels


def noise(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(params=SHAPES, ids=str)
def example(request):
    """Image, reconstruction, mask with unequal counts, cell size."""
    grid, cell, channels = request.param
    size = [g * s for g, s in zip(grid, cell)]
    visible = torch.rand(3, *grid, generator=torch.Generator().manual_seed(1)) < 0.5
    visible[:, 0, 0, 0], visible[:, -1, -1, -1] = True, False
    image = 3 + 2 * noise(3, channels, *size)
    return image, noise(3, channels, *size, seed=2), visible, cell


@pytest.fixture(params=TARGETS)
def target(request) -> str:
    return request.param


def naive_loss(
    image: np.ndarray, reconstruction: np.ndarray, visible: np.ndarray, cell: tuple, target: str
) -> float:
    """Cell by cell and channel by channel."""
    errors = []
    for b, i, j, k in np.argwhere(~visible):
        box = tuple(slice(g * s, (g + 1) * s) for g, s in zip((i, j, k), cell))
        per_channel = []
        for c in range(image.shape[1]):
            x, y = image[b, c][box], reconstruction[b, c][box]
            if target == "cell":
                x = (x - x.mean()) / np.sqrt(x.var(ddof=1) + 1e-6)
            per_channel.append(((y - x) ** 2).mean())
        errors.append(np.mean(per_channel))
    return float(np.mean(errors))


def test_patchify_round_trip(example):
    image, _, visible, cell = example
    cells = patchify(image, cell)
    assert cells.shape == (*visible.shape, image.shape[1], int(np.prod(cell)))
    assert torch.equal(unpatchify(cells, cell), image)
    for b, i, j, k in torch.ones_like(visible).nonzero().tolist():
        box = image[b, :, i * cell[0] :, j * cell[1] :, k * cell[2] :][:, : cell[0], : cell[1], : cell[2]]
        assert torch.equal(cells[b, i, j, k], box.flatten(1))


def test_patchify_refuses_a_rest():
    with pytest.raises(ValueError, match=r"image of size \(4, 5, 4\) is not divisible by \(2, 2, 2\)"):
        patchify(torch.zeros(1, 1, 4, 5, 4), (2, 2, 2))


def test_loss_equals_loops(example, target):
    image, reconstruction, visible, cell = example
    ours = reconstruction_loss(image, reconstruction, visible, target)
    assert ours.dtype == torch.float64 and ours.shape == ()
    loops = naive_loss(image.numpy(), reconstruction.numpy(), visible.numpy(), cell, target)
    assert ours.item() == pytest.approx(loops, 1e-12)


def test_loss_in_float32(example, target):
    image, reconstruction, visible, cell = example
    ours = reconstruction_loss(image.float(), reconstruction.float(), visible, target)
    assert ours.dtype == torch.float32
    loops = naive_loss(image.numpy(), reconstruction.numpy(), visible.numpy(), cell, target)
    assert ours.item() == pytest.approx(loops, 1e-5)


def test_the_papers_target_is_the_default(example):
    image, reconstruction, visible, _ = example
    ours = reconstruction_loss(image, reconstruction, visible)
    assert torch.equal(ours, reconstruction_loss(image, reconstruction, visible, "cell"))
    shown = denormalise(image, reconstruction, visible)
    assert torch.equal(shown, denormalise(image, reconstruction, visible, "cell"))


def test_an_unknown_target_is_named():
    with pytest.raises(ValueError, match="the target is 'mean'; expected one of cell, intensity"):
        target_statistics(torch.zeros(1, 2, 8), "mean")


def test_intensities_are_compared_on_hidden_voxels_alone(example):
    """Against the plain mean over voxels."""
    image, reconstruction, visible, cell = example
    hidden = ~upsample_mask(visible, cell).expand_as(image)
    expected = torch.nn.functional.mse_loss(reconstruction[hidden], image[hidden])
    torch.testing.assert_close(reconstruction_loss(image, reconstruction, visible, "intensity"), expected)
    shown = denormalise(image, reconstruction, visible, "intensity")
    assert torch.equal(shown, torch.where(hidden, reconstruction, image))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int16])
def test_loss_promotes_small_types(dtype, target):
    """Half precision and integer images are computed in float32."""
    visible = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    image, reconstruction = (noise(1, 1, 4, 4, 4) * 100).to(dtype), noise(1, 1, 4, 4, 4, seed=1).bfloat16()
    ours = reconstruction_loss(image, reconstruction, visible, target)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, reconstruction_loss(image.float(), reconstruction.float(), visible, target))
    assert denormalise(image, reconstruction, visible, target).dtype == torch.float32


@pytest.mark.parametrize("filler", [5.0, 1e30, float("nan")])
def test_loss_ignores_visible_cells(example, filler, target):
    """In the image and in the reconstruction; their gradient is zero."""
    image, reconstruction, visible, cell = example
    mask = upsample_mask(visible, cell)
    dirty = torch.where(mask, filler, reconstruction).requires_grad_()
    loss = reconstruction_loss(torch.where(mask, filler, image), dirty, visible, target)
    assert torch.equal(loss, reconstruction_loss(image, reconstruction, visible, target))
    (gradient,) = torch.autograd.grad(loss, dirty)
    assert ((gradient != 0) == ~mask).all()


def test_loss_does_not_see_a_cell_s_level_and_contrast(example):
    """Targets are normalised per cell and channel, so a per-cell affine change of the image alters nothing."""
    image, reconstruction, visible, cell = example
    cells = patchify(image, cell)
    scale = torch.rand(*cells.shape[:-1], 1, dtype=torch.float64) * 1000 + 100
    changed = unpatchify(cells * scale + noise(*scale.shape), cell)
    before, after = (reconstruction_loss(x, reconstruction, visible) for x in (image, changed))
    assert after.item() == pytest.approx(before.item(), rel=1e-5)


def test_perfect_and_constant_cells():
    """Normalised truth costs nothing; a cell without contrast has target zero, not NaN."""
    visible = torch.zeros(1, 2, 1, 1, dtype=torch.bool)
    image = noise(1, 2, 4, 2, 2)
    image[:, :, 2:] = 7.0
    cells = patchify(image, (2, 2, 2))
    mean, std = cell_statistics(cells)
    truth = unpatchify((cells - mean) / std, (2, 2, 2))
    assert reconstruction_loss(image, truth, visible).item() == 0.0
    assert torch.equal(truth[:, :, 2:], torch.zeros_like(truth[:, :, 2:]))


def test_every_masked_cell_weighs_the_same(target):
    """The mean runs over all masked cells of the batch, however they spread over its samples."""
    visible = torch.ones(2, 2, 2, 2, dtype=torch.bool)
    visible[0, 0, 0, 0] = False
    visible[1, :, :, 0] = False
    image, reconstruction = noise(2, 1, 4, 4, 4), noise(2, 1, 4, 4, 4, seed=1)
    one, four = (
        reconstruction_loss(image[b : b + 1], reconstruction[b : b + 1], visible[b : b + 1], target) for b in (0, 1)
    )
    together = reconstruction_loss(image, reconstruction, visible, target)
    torch.testing.assert_close(together, (one + 4 * four) / 5, rtol=1e-12, atol=0)


def test_denormalise(example):
    """Visible cells are the image, bit by bit; hidden ones get their own mean and spread back."""
    image, reconstruction, visible, cell = example
    shown = denormalise(image, reconstruction, visible)
    mask = upsample_mask(visible, cell).expand_as(image)
    assert shown.shape == image.shape
    assert torch.equal(shown[mask], image[mask])
    mean, std = cell_statistics(patchify(image, cell))
    expected = unpatchify(patchify(reconstruction, cell) * std + mean, cell)
    torch.testing.assert_close(shown[~mask], expected[~mask], rtol=0, atol=1e-12)
    truth = unpatchify((patchify(image, cell) - mean) / std, cell)
    torch.testing.assert_close(denormalise(image, truth, visible), image, rtol=0, atol=1e-12)


def test_denormalise_keeps_visible_float32_exactly(target):
    image = noise(2, 2, 8, 8, 8, dtype=torch.float32) * 1000
    visible = random_visible(2, (2, 2, 2), 0.5, torch.Generator().manual_seed(0))
    mask = upsample_mask(visible, (4, 4, 4)).expand_as(image)
    assert torch.equal(denormalise(image, torch.zeros_like(image), visible, target)[mask], image[mask])
