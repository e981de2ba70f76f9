"""Patch and batch sizes that suit a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..geometry import Size3, volume
from .memory import Line, MemoryModel

MIN_BATCH = 2
"""Smallest batch of either training, as in nnU-Net."""
SMALLER_NETWORK = "with a smaller base_width (nnUNet_hyspark=base_width=16)"
"""What else helps where the planner chooses the network."""


@dataclass(frozen=True)
class Fit:
    """What to train with.

    Attributes:
        patch_size: voxels, of both trainings.
        pretraining_batch, finetuning_batch: crops per step.
        pretraining_gb, finetuning_gb: estimated peaks.
    """

    patch_size: Size3
    pretraining_batch: int
    finetuning_batch: int
    pretraining_gb: float
    finetuning_gb: float


class TargetTooSmall(ValueError):
    """The smallest network does not fit. ``required_gb`` is the target that works."""

    def __init__(self, message: str, required_gb: float):
        super().__init__(message)
        self.required_gb = required_gb


def fit_patch(
    lines: Sequence[Line], candidates: Sequence[Size3], target_gb: float, advice: str = SMALLER_NETWORK
) -> Size3:
    """The first patch that fits with the smallest batch.

    Args:
        lines: memory of every training that is to fit.
        candidates: largest first.
        target_gb: memory of the GPU.
        advice: what else helps if none fits; ends the error's sentence after "or".

    Raises:
        TargetTooSmall: if none fits.
    """
    for patch in candidates:
        if max(line.gb(patch, MIN_BATCH) for line in lines) <= target_gb:
            return patch
    smallest = candidates[-1]
    needed = math.ceil(max(line.gb(smallest, MIN_BATCH) for line in lines) * 10) / 10
    raise TargetTooSmall(
        f"the smallest patch of this network ({'x'.join(map(str, smallest))} voxels, {MIN_BATCH} per batch) needs "
        f"about {needed:.1f} GB, but the memory target is {target_gb:g} GB; plan with -gpu_memory_target "
        f"{needed:.1f} or more, or {advice}.",
        needed,
    )


def fit_batch(line: Line, patch_size: Sequence[int], target_gb: float, max_voxels: float) -> int:
    """As many patches per batch as fit, at least :data:`MIN_BATCH`.

    Args:
        line: memory of the training.
        patch_size: voxels.
        target_gb: memory of the GPU.
        max_voxels: of a batch, so that a step never sees too much of the data set.
    """
    most = round(max_voxels / volume(patch_size))
    return max(min(line.batch_size(patch_size, target_gb), most), MIN_BATCH)


def fit(model: MemoryModel, candidates: Sequence[Size3], target_gb: float, max_voxels: float) -> Fit:
    """Patch and batches of pre-training and fine-tuning; see :func:`fit_patch` and :func:`fit_batch`."""
    patch_size = fit_patch((model.pretraining, model.finetuning), candidates, target_gb)
    pretraining = fit_batch(model.pretraining, patch_size, target_gb, max_voxels)
    finetuning = fit_batch(model.finetuning, patch_size, target_gb, max_voxels)
    return Fit(
        patch_size, pretraining, finetuning,
        model.pretraining.gb(patch_size, pretraining), model.finetuning.gb(patch_size, finetuning),
    )
