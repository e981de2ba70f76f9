"""Junction masks: which cells of the CNN-transformer junction stay visible.

A mask is a boolean tensor ``visible`` of shape ``(B, g0, g1, g2)``, one entry per junction cell of the crop; True means
the encoder sees the cell. Everything finer follows by up-sampling (HySparK, section 2.1, bottom-up masking).
"""

from __future__ import annotations

import torch

from .geometry import Size3, volume


def count_visible(grid: Size3, mask_ratio: float) -> int:
    """Number of visible cells of a grid at a mask ratio: ``round((1 - mask_ratio) * cells)``.

    Args:
        grid: cells per axis ``(g0, g1, g2)``.
        mask_ratio: fraction of cells that are hidden, inside the open interval (0, 1).

    Raises:
        ValueError: if the ratio is out of range, or leaves no visible or no masked cell on this grid.
    """
    if not 0.0 < mask_ratio < 1.0:
        raise ValueError(f"mask_ratio is {mask_ratio}; expected a fraction above 0 and below 1.")
    cells = volume(grid)
    visible = round((1.0 - mask_ratio) * cells)
    if visible == 0 or visible == cells:
        state = "no visible" if visible == 0 else "no masked"
        usable = f"a ratio between {1 / cells:.4f} and {1 - 1 / cells:.4f}, or " if cells > 1 else ""
        raise ValueError(
            f"mask_ratio {mask_ratio} leaves {state} cell on a grid of {grid[0]}x{grid[1]}x{grid[2]} cells; "
            f"use {usable}a larger patch."
        )
    return visible


def random_visible(batch_size: int, grid: Size3, mask_ratio: float, generator: torch.Generator) -> torch.Tensor:
    """Draws one uniformly random mask per sample, all with the same number of visible cells.

    Returns:
        Boolean tensor ``(B, g0, g1, g2)`` on the generator's device.

    Raises:
        ValueError: as :func:`count_visible`.
    """
    keep = count_visible(grid, mask_ratio)
    noise = torch.rand((batch_size, volume(grid)), generator=generator, device=generator.device)
    visible = torch.zeros_like(noise, dtype=torch.bool)
    visible.scatter_(1, noise.argsort(dim=1)[:, :keep], True)
    return visible.view(batch_size, *grid)


def random_visible_between(
    batch_size: int, grid: Size3, lowest: float, highest: float, generator: torch.Generator
) -> torch.Tensor:
    """As :func:`random_visible`, every sample with a mask ratio of its own, uniform between two.

    Few hidden cells bring training close to the whole images that the encoder sees later; many make the task hard.

    Raises:
        ValueError: as :func:`count_visible`, for either ratio.
    """
    most, fewest = count_visible(grid, lowest), count_visible(grid, highest)
    shares = torch.rand(batch_size, generator=generator, device=generator.device)
    keep = (fewest + shares * (most - fewest)).round().long()
    noise = torch.rand((batch_size, volume(grid)), generator=generator, device=generator.device)
    visible = noise.argsort(dim=1).argsort(dim=1) < keep[:, None]
    return visible.view(batch_size, *grid)


def upsample_mask(visible: torch.Tensor, factor: Size3) -> torch.Tensor:
    """Repeats every cell ``factor`` times per axis: ``(B, g0, g1, g2)`` to ``(B, 1, g0*f0, g1*f1, g2*f2)``."""
    for axis, repeats in enumerate(factor):
        visible = visible.repeat_interleave(repeats, dim=axis + 1)
    return visible.unsqueeze(1)
