"""Validation of pre-training: how well held-out cases are reconstructed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ..data.cases import image_shape, random_corner, read_crop
from ..geometry import Size3
from ..masking import upsample_mask
from ..pretext.hyspark import HySparK, denormalise, reconstruction_loss
from .pictures import save_reconstruction_picture

CROPS_PER_CASE = 4


@torch.no_grad()
def validate_cases(
    network: HySparK,
    cases: Sequence[tuple[str, Path]],
    patch_size: Size3,
    spacing: tuple[float, ...],
    mask_ratio: float,
    seed: int,
    device: torch.device,
    folder: Path,
    log: Callable[..., None],
) -> list[dict]:
    """Reconstructs crops of every case, the first from its middle, with fixed masks, and draws the first.

    Args:
        network: in evaluation mode.
        cases: names and preprocessed images.
        patch_size: voxels per axis.
        spacing: mm per voxel, for the pictures.
        mask_ratio: fraction of hidden cells.
        seed: of crops and masks.
        device: where to compute.
        folder: where the pictures go.
        log: takes a line.

    Returns:
        Per case ``case``, ``loss`` (see :func:`reconstruction_loss`), ``masked_mae`` and ``picture``.
    """
    results = []
    for index, (name, path) in enumerate(cases):
        shape = image_shape(path)
        rng = np.random.default_rng((seed, 2, index))
        middle = [(extent - edge) // 2 for extent, edge in zip(shape, patch_size)]
        fits = all(extent <= edge for extent, edge in zip(shape, patch_size))
        corners = [middle] + [random_corner(shape, patch_size, rng) for _ in range(0 if fits else CROPS_PER_CASE - 1)]
        losses, errors = [], []
        picture = folder / f"{name}.png"
        for number, corner in enumerate(corners):
            image = torch.from_numpy(read_crop(path, corner, patch_size))[None].to(device)
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            visible = network.draw_mask(1, patch_size, mask_ratio, generator).to(device)
            prediction = network(image, visible)
            losses.append(reconstruction_loss(image, prediction, visible).item())
            restored = denormalise(image, prediction, visible)
            seen = upsample_mask(visible, network.encoder.junction_stride)
            errors.append((restored - image).abs()[(~seen).expand_as(image)].mean().item())
            if number == 0:
                save_reconstruction_picture(
                    picture,
                    image[0, 0].float().cpu().numpy(),
                    seen[0, 0].cpu().numpy(),
                    restored[0, 0].cpu().numpy(),
                    (spacing[0], spacing[1], spacing[2]),
                    f"{name}: {mask_ratio:.0%} masked, loss {losses[0]:.3f}",
                )
        results.append({"case": name, "loss": float(np.mean(losses)), "masked_mae": float(np.mean(errors)),
                        "picture": picture.name})
        log(f"reconstructed {name}: loss {results[-1]['loss']:.4f}")
    return results
