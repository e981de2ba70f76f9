"""Pictures during training: the same cases, crops and masks every time, and a contact sheet over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ..data.cases import image_shape, read_crop
from ..geometry import Size3
from ..pretext.hyspark import HySparK
from .pictures import read_gray, save_contact_sheet, save_gray, save_reconstruction_picture, three_planes
from .reconstruction import reconstruct
from .validation import middle_corner

MAX_ROWS = 24


def spread_evenly(names: Sequence[str], count: int) -> list[str]:
    """At most ``count`` of the names, evenly spread over the sorted list."""
    ordered = sorted(names)
    picks = np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int)
    return [ordered[i] for i in picks]


class Previews:
    """Draws reconstructions of fixed crops.

    Writes below ``folder``: ``CASE/epoch_N.png`` (original, masked, reconstruction and error in three planes) and
    ``CASE_over_time.png`` (the reconstruction at up to 24 epochs, under the original).

    Args:
        folder: where to.
        cases: names and preprocessed images of this process.
        patch_size: voxels per axis.
        spacing: mm per voxel.
        mask_ratio: fraction of hidden cells.
        seed: of the masks.
        log: takes a line.
    """

    def __init__(
        self,
        folder: Path,
        cases: Sequence[tuple[str, Path]],
        patch_size: Size3,
        spacing: tuple[float, float, float],
        mask_ratio: float,
        seed: int,
        log: Callable[[str], None],
    ):
        self.folder = folder
        self.cases = list(cases)
        self.patch_size = patch_size
        self.spacing = spacing
        self.mask_ratio = mask_ratio
        self.seed = seed
        self.log = log

    def draw(self, network: HySparK, epoch: int, device: torch.device) -> None:
        """Draws all cases; what cannot be read or written, or needs more memory than the GPU has left, is said and
        passed over: a picture never ends a run.

        Args:
            network: in evaluation mode.
            epoch: epochs that are done.
            device: where to compute.
        """
        for name, path in self.cases:
            try:
                self._draw_case(network, name, path, epoch, device)
            except (OSError, ValueError, torch.cuda.OutOfMemoryError) as error:
                self.log(f"WARNING: no preview of {name}: {error}")

    def _draw_case(self, network: HySparK, name: str, path: Path, epoch: int, device: torch.device) -> None:
        crop = read_crop(path, middle_corner(image_shape(path), self.patch_size), self.patch_size)
        result = reconstruct(network, crop, self.mask_ratio, self.seed, device)
        folder = self.folder / name
        strips = folder / "strips"
        strips.mkdir(parents=True, exist_ok=True)
        title = f"{name}, epoch {epoch}: {self.mask_ratio:.0%} masked, loss {result.loss:.3f}"
        picture = folder / f"epoch_{epoch:06d}.png"
        save_reconstruction_picture(
            picture, result.image[0], result.visible, result.restored[0], self.spacing, title
        )
        low, high = np.percentile(result.image[0], [0.5, 99.5])
        original = three_planes(result.image[0], low, high)
        masked = three_planes(np.where(result.visible, result.image[0], low), low, high)
        save_gray(strips / f"epoch_{epoch:06d}.png", three_planes(result.restored[0], low, high))
        earlier = sorted(p for p in strips.glob("epoch_*.png") if int(p.stem.split("_")[1]) <= epoch)
        rows = [("original", original), ("masked", masked)]
        for strip in [earlier[i] for i in np.linspace(0, len(earlier) - 1, min(MAX_ROWS, len(earlier))).astype(int)]:
            rows.append((f"epoch {int(strip.stem.split('_')[1])}", read_gray(strip)))
        save_contact_sheet(self.folder / f"{name}_over_time.png", rows, f"{name}, {self.mask_ratio:.0%} masked")
