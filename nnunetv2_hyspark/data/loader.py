"""Batches of crops and masks for pre-training, every sample a pure function of (seed, step, position in the batch).

So the order is the same with any number of worker processes, a resumed run goes on with the very next batch, and the
samples of a global batch do not depend on how it is split over processes.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..geometry import Size3
from ..heap import give_back_freed_memory
from .cases import corner_around, foreground_voxels, image_shape, random_corner, read_crop

DrawMask = Callable[[torch.Generator], torch.Tensor]

ATTEMPTS = 20
BACKGROUND_DEVIATION = 0.05


@dataclass(frozen=True)
class Sample:
    """One crop: float32 ``(C, D, H, W)``, its visible cells ``(1, g0, g1, g2)``, and all that it was made of."""

    crop: np.ndarray
    visible: torch.Tensor
    case: str
    corner: list[int]
    flips: list[int]
    mask_seed: int
    skipped: list[str]


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
        global_batch: samples of all processes together; the number of positions if not given.
        on_broken_case: ``"stop"``, or ``"skip"``: another case is drawn instead of one that cannot be read.
        foreground_fraction: share of crops around a random voxel of the foreground, see :func:`foreground_voxels`; the
            others lie anywhere.
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
        global_batch: int | None = None,
        on_broken_case: str = "stop",
        foreground_fraction: float = 0.0,
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
        self.global_batch = global_batch or len(self.positions)
        self.on_broken_case = on_broken_case
        self.foreground_fraction = foreground_fraction
        self._shapes: dict[int, Size3] = {}
        self._foreground: dict[int, np.ndarray] = {}

    def _first_case(self, rng: np.random.Generator, step: int, position: int) -> int:
        if self.in_order:
            return (step * self.global_batch + position) % len(self.files)
        return int(rng.integers(len(self.files)))

    def cases(self, step: int) -> list[str]:
        """Which cases a step reads first; nothing is opened."""
        firsts = [self._first_case(np.random.default_rng((*self.seed, step, p)), step, p) for p in self.positions]
        return [self.names[case] for case in firsts]

    def _corner(self, case: int, rng: np.random.Generator) -> list[int]:
        shape = self._shapes[case]
        if self.foreground_fraction and rng.random() < self.foreground_fraction:
            if case not in self._foreground:
                self._foreground[case] = foreground_voxels(self.files[case])
            voxels = self._foreground[case]
            if len(voxels):
                return corner_around(voxels[rng.integers(len(voxels))], shape, self.patch_size)
        return random_corner(shape, self.patch_size, rng)

    def _read(self, case: int, rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
        path = self.files[case]
        try:
            if case not in self._shapes:
                self._shapes[case] = image_shape(path)
            corner = self._corner(case, rng)
            return read_crop(path, corner, self.patch_size), corner
        except FileNotFoundError:
            raise ValueError(
                f"case {self.names[case]} has vanished: there is no {path}; restore it, or run nnUNetv2_preprocess "
                f"again."
            ) from None

    def sample(self, step: int, position: int) -> Sample:
        """One sample of the global batch.

        Raises:
            ValueError: if a case cannot be read and such cases are not skipped, or too many in a row cannot be read.
        """
        rng = np.random.default_rng((*self.seed, step, position))
        case = self._first_case(rng, step, position)
        skipped: list[str] = []
        while True:
            try:
                crop, corner = self._read(case, rng)
                break
            except (ValueError, OSError) as error:
                if self.on_broken_case == "stop":
                    raise ValueError(f"{error} Or set on_broken_case=skip to go on without it.") from None
                skipped.append(f"{self.names[case]}: {error}")
                if len(skipped) == ATTEMPTS:
                    raise ValueError(
                        f"{ATTEMPTS} cases in a row could not be read, the last one: {error}"
                    ) from None
                case = (case + 1) % len(self.files) if self.in_order else int(rng.integers(len(self.files)))
        flips = [axis for axis in self.flip_axes if rng.random() < 0.5]
        if flips:
            crop = np.ascontiguousarray(np.flip(crop, tuple(axis + 1 for axis in flips)))
        mask_seed = int(rng.integers(2**62))
        visible = self.draw_mask(torch.Generator().manual_seed(mask_seed))
        return Sample(crop, visible, self.names[case], corner, flips, mask_seed, skipped)

    def __getitem__(self, step: int) -> dict[str, Any]:
        """The batch of a step.

        Returns:
            ``data`` float32 ``(B, C, D, H, W)``; ``visible`` bool ``(B, g0, g1, g2)``; ``step``; per sample ``keys``
            (case names), ``corners`` (first voxel), ``flips`` (axes) and ``mask_seeds``; ``background``: how many crops
            are nearly constant (standard deviation below 0.05 of normalised intensities); ``skipped``: sentences on
            cases that could not be read. Or ``{"error": sentence}``, because an exception that leaves a worker process
            arrives as its whole traceback.
        """
        try:
            samples = [self.sample(step, position) for position in self.positions]
        except ValueError as error:
            return {"error": str(error)}
        return {
            "data": torch.from_numpy(np.stack([s.crop for s in samples])),
            "visible": torch.cat([s.visible for s in samples]),
            "keys": [s.case for s in samples],
            "step": step,
            "corners": [s.corner for s in samples],
            "flips": [s.flips for s in samples],
            "mask_seeds": [s.mask_seed for s in samples],
            "background": sum(float(s.crop.std()) < BACKGROUND_DEVIATION for s in samples),
            "skipped": [sentence for s in samples for sentence in s.skipped],
        }


class WorkerWatch:
    """Lets torch's handler of SIGCHLD raise only while a batch is waited for.

    Torch installs a handler that raises as soon as a worker dies, wherever the main process is at that moment, even in
    the middle of an update of the weights.

    Args:
        handler: torch's.
    """

    def __init__(self, handler: Callable[[int, FrameType | None], Any]):
        self.handler = handler
        self.waiting = False
        self.missed = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.missed = True
        if self.waiting:
            self.check()

    def check(self) -> None:
        """Raises RuntimeError if a worker has died since the last check."""
        if self.missed:
            self.missed = False
            self.handler(signal.SIGCHLD, None)

    @classmethod
    def install(cls) -> WorkerWatch | None:
        """Wraps the present handler, once; None where there is none (in this process, thread or system)."""
        if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
            return None
        present = signal.getsignal(signal.SIGCHLD)
        if isinstance(present, cls) or not callable(present):
            return present if isinstance(present, cls) else None
        watch = cls(present)
        signal.signal(signal.SIGCHLD, watch)
        return watch


class Batches:
    """Endless iterator over a range of steps, in the background if there are workers.

    Args:
        dataset: see :class:`CropBatches`.
        steps: what to iterate; with ``repeat`` again and again.
        workers: background processes; 0 loads in this one.
        pin_memory: whether batches are put in page-locked memory for the GPU.
        repeat: start over when the steps are used up.
        timeout: longest wait for a batch, in seconds; 0 waits for ever.
    """

    def __init__(
        self,
        dataset: CropBatches,
        steps: range,
        workers: int,
        pin_memory: bool,
        repeat: bool = False,
        timeout: float = 0.0,
    ):
        self.dataset = dataset
        self.steps = steps
        self.loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            pin_memory=pin_memory,
            prefetch_factor=3 if workers else None,
            persistent_workers=bool(workers) and repeat,
            timeout=timeout if workers else 0.0,
            generator=torch.Generator(),  # else every iteration would draw from the global one
        )
        self.repeat = repeat
        self._delivered = 0
        self._iterator: Iterator | None = None
        self._watch: WorkerWatch | None = None

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, Any]:
        """The next batch.

        Raises:
            ValueError: if a case cannot be read.
            RuntimeError: if a worker process has died or does not deliver in time.
        """
        failure = ""
        try:
            batch = self._next()
        except (RuntimeError, ConnectionError, EOFError) as error:
            if not self.loader.num_workers:
                raise
            failure = self._death_notice(error)
        if failure:
            self.close()  # only now nothing refers to the iterator any more, so that torch forgets the dead worker
            raise RuntimeError(failure)
        if "error" in batch:
            raise ValueError(batch["error"])
        self._delivered += 1
        return batch

    def _next(self) -> dict[str, Any]:
        iterator = self._start() if self._iterator is None else self._iterator
        if self._watch is None:
            return self._next_or_again(iterator)
        try:
            self._watch.waiting = True
            self._watch.check()
            return self._next_or_again(iterator)
        finally:
            self._watch.waiting = False

    def _start(self) -> Iterator:
        if self.loader.num_workers:
            give_back_freed_memory()
        self._iterator = iter(self.loader)
        self._watch = WorkerWatch.install() if self.loader.num_workers else None
        return self._iterator

    def _next_or_again(self, iterator: Iterator) -> dict[str, Any]:
        try:
            return next(iterator)
        except StopIteration:
            if not self.repeat:
                raise
            self._iterator = iter(self.loader)
            return next(self._iterator)

    def _death_notice(self, error: Exception) -> str:
        first = self._delivered % max(len(self.steps), 1)
        in_flight = self.steps[first : first + 3 * self.loader.num_workers]
        cases = sorted({name for step in in_flight for name in self.dataset.cases(step)})
        shown = ", ".join(cases[:8]) + (f" and {len(cases) - 8} more" if len(cases) > 8 else "")
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return (
            f"loading data failed ({reason}); a worker was killed (often by the system, for want of memory), hangs, or "
            f"crashed on a file, being on its way to {shown}; use fewer workers (nnUNet_n_proc_DA) or check these "
            f"files, then go on with --c."
        )

    def close(self) -> None:
        """Ends the workers."""
        self._iterator = None
