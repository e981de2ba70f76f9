"""How fast crops come from preprocessed cases, and whether a training step would wait for them."""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading import nnunet_dataset
from scipy.ndimage import gaussian_filter

from ..data.loader import Batches, CropBatches
from ..geometry import Size3
from ..masking import random_visible
from ..pretext.hyspark import HySparKConfig

FOREGROUND_SAMPLES = 10_000
"""As many voxels of a label nnU-Net's preprocessing notes in a case's properties."""


def write_cases(folder: Path, count: int, shape: Size3, patch_size: Size3, channels: int = 1) -> list[Path]:
    """Synthetic scans, smooth structure and noise, compressed as nnU-Net's preprocessing does for this patch size.

    The properties beside them hold sampled voxels ``(n, 4)`` of a foreground mask, the middle three quarters of every
    axis, as those of a data set that ``hyspark prepare`` made.
    """
    rng = np.random.default_rng(0)
    saver: Any = nnunet_dataset.nnUNetDatasetBlosc2
    parameters = getattr(nnunet_dataset, "comp_blosc2_params", None) or saver.comp_blosc2_params  # nnU-Net 2.8, 2.7
    blocks, chunks = parameters((channels, *shape), patch_size)
    blocks_seg, chunks_seg = parameters((1, *shape), patch_size)
    files = []
    for number in range(count):
        smooth = gaussian_filter(rng.standard_normal((channels, *shape), dtype=np.float32), (0, 4, 4, 4))
        image = smooth / smooth.std() + 0.1 * rng.standard_normal(smooth.shape, dtype=np.float32)
        name = str(folder / f"synthetic_{number}")
        mask = np.zeros((1, *shape), np.int8)
        mask[0][tuple(slice(edge // 8, edge - edge // 8) for edge in shape)] = 1
        inside = np.flatnonzero(mask)
        sampled = rng.choice(inside, min(FOREGROUND_SAMPLES, inside.size), replace=False)
        properties = {"class_locations": {1: np.stack(np.unravel_index(sampled, mask.shape), 1)}}
        saver.save_case(
            image, mask, properties, name, chunks=chunks, blocks=blocks, chunks_seg=chunks_seg, blocks_seg=blocks_seg
        )
        files.append(Path(f"{name}.b2nd"))
    return files


@contextmanager
def handed_over(batches: Batches, ahead: int) -> Iterator[Iterator[dict[str, Any]]]:
    """Batches as a thread takes them from the workers, at most ``ahead`` in advance; with 0 there is no thread.

    The loader is closed at the end.
    """
    ready: queue.Queue[dict[str, Any] | Exception] = queue.Queue(ahead)
    over = threading.Event()

    def take() -> None:
        try:
            while not over.is_set():
                ready.put(next(batches))
        except Exception as error:  # whatever it is, it belongs to who waits for the batch
            ready.put(error)

    def delivered() -> dict[str, Any]:
        batch = ready.get()
        if isinstance(batch, Exception):
            raise batch
        return batch

    thread = threading.Thread(target=take, daemon=True)
    try:
        if not ahead:
            yield batches
            return
        thread.start()
        yield iter(delivered, None)
    finally:
        over.set()
        while thread.is_alive():  # it may wait for room
            with suppress(queue.Empty):
                ready.get(timeout=0.1)
        batches.close()


def measure_loading(
    files: Sequence[Path], size: Size3, grid: Size3, batch: int, workers: Sequence[int], step_seconds: float,
    steps: int = 60,
) -> dict[str, dict[str, float]]:
    """Loads batches as pre-training with default settings does on a data set that ``hyspark prepare`` made.

    Pre-training on a GPU has torch take over what workers deliver, and copy it to page-locked memory, in a thread. A
    thread stands for that one here, so that the figures hold without a GPU too.

    Args:
        files: preprocessed images.
        size: voxels of a crop.
        grid: junction cells of a crop.
        batch: crops per step.
        workers: numbers of background processes to try.
        step_seconds: how long a training step is pretended to take; the process sleeps.
        steps: batches that count.

    Returns:
        Per number of workers ``crops_per_second`` without any step, and ``waiting_share``, the fraction of the time
        that a training with such steps would wait for data.
    """
    draw_mask = functools.partial(random_visible, 1, grid, 0.75)
    data = CropBatches(
        files, [file.stem for file in files], size, range(batch), draw_mask, (0, 0), (0, 1, 2),
        foreground_fraction=HySparKConfig().foreground_fraction,
    )
    results = {}
    for count in workers:
        batches = Batches(data, range(10**6), count, pin_memory=False)
        with handed_over(batches, 3 * count) as delivered:
            for _ in range(4 + 3 * count):  # started and filled
                next(delivered)
            begin = time.perf_counter()
            for _ in range(steps):
                next(delivered)
            rate = steps * batch / (time.perf_counter() - begin)
            time.sleep(3 * count * batch / rate if count else 0)
            waiting, begin = 0.0, time.perf_counter()
            for _ in range(steps):
                asked = time.perf_counter()
                taken = next(delivered)
                waiting += time.perf_counter() - asked
                time.sleep(step_seconds)
                del taken
        results[str(count)] = {
            "crops_per_second": rate, "waiting_share": waiting / (time.perf_counter() - begin),
        }
    return results
