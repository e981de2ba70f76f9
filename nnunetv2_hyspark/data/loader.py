"""Batches of crops and masks for pre-training, every sample a pure function of (seed, step, position in the batch).

So the order is the same with any number of worker processes, a resumed run goes on with the very next batch, and the
samples of a global batch do not depend on how it is split over processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..geometry import Size3
from .cases import image_shape, random_corner, read_crop

DrawMask = Callable[[torch.Generator], torch.Tensor]


class CropBatches(Dataset):
    """Map from step to batch.

    Args:
        files: preprocessed images, see :func:`nnunetv2_hyspark.data.cases.find_image`.
        names: case names, for messages and logs.
        patch_size: voxels per axis.
        positions: which samples of the global batch this process makes.
        draw_mask: draws one sample's visible cells, boolean ``(1, g0, g1, g2)``, from a generator.
        seed: entropy of everything random.
        flip_axes: spatial axes that are flipped with probability one half.
        in_order: take cases in turn instead of at random (validation).
    """

    def __init__(
        self,
        files: Sequence[Path],
        names: Sequence[str],
        patch_size: Size3,
        positions: Sequence[int],
        draw_mask: DrawMask,
        seed: Sequence[int],
        flip_axes: Sequence[int] = (),
        in_order: bool = False,
    ):
        if not files:
            raise ValueError("there is no case to draw crops from; expected at least one preprocessed image.")
        self.files = list(files)
        self.names = list(names)
        self.patch_size = patch_size
        self.positions = list(positions)
        self.draw_mask = draw_mask
        self.seed = tuple(seed)
        self.flip_axes = tuple(flip_axes)
        self.in_order = in_order
        self._shapes: dict[int, Size3] = {}

    def _sample(self, step: int, position: int) -> tuple[np.ndarray, torch.Tensor, str]:
        rng = np.random.default_rng((*self.seed, step, position))
        case = (step * len(self.positions) + position) if self.in_order else int(rng.integers(len(self.files)))
        case %= len(self.files)
        path = self.files[case]
        if case not in self._shapes:
            self._shapes[case] = image_shape(path)
        crop = read_crop(path, random_corner(self._shapes[case], self.patch_size, rng), self.patch_size)
        flips = [axis + 1 for axis in self.flip_axes if rng.random() < 0.5]
        if flips:
            crop = np.ascontiguousarray(np.flip(crop, flips))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        return crop, self.draw_mask(generator), self.names[case]

    def __getitem__(self, step: int) -> dict:
        """``{"data": (B, C, D, H, W) float32, "visible": (B, g0, g1, g2) bool, "keys": case names, "step": step}``."""
        samples = [self._sample(step, position) for position in self.positions]
        return {
            "data": torch.from_numpy(np.stack([s[0] for s in samples])),
            "visible": torch.cat([s[1] for s in samples]),
            "keys": [s[2] for s in samples],
            "step": step,
        }


class Batches:
    """Endless iterator over a range of steps, in the background if there are workers.

    Args:
        dataset: see :class:`CropBatches`.
        steps: what to iterate; with ``repeat`` again and again.
        workers: background processes; 0 loads in this one.
        pin_memory: whether batches are put in page-locked memory for the GPU.
        repeat: start over when the steps are used up.
    """

    def __init__(self, dataset: CropBatches, steps: range, workers: int, pin_memory: bool, repeat: bool = False):
        self.loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            pin_memory=pin_memory,
            prefetch_factor=3 if workers else None,
            persistent_workers=bool(workers) and repeat,
        )
        self.repeat = repeat
        self.waited = 0.0
        self._iterator: Iterator | None = None

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict:
        """The next batch; the time it took is added to ``waited``, in seconds."""
        start = perf_counter()
        try:
            return self._next()
        finally:
            self.waited += perf_counter() - start

    def _next(self) -> dict:
        if self._iterator is None:
            self._iterator = iter(self.loader)
        try:
            return next(self._iterator)
        except StopIteration:
            if not self.repeat:
                raise
            self._iterator = iter(self.loader)
            return next(self._iterator)

    def close(self) -> None:
        """Ends the workers."""
        self._iterator = None
