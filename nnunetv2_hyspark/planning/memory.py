"""GPU memory of pre-training and of fine-tuning as a function of patch and batch size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..geometry import Size3, cumulative_strides, volume
from ..pretext.hyspark import HySparKConfig
from .steps import trace_finetuning, trace_pretraining
from .trace import StepMemory

GB = 1e9
"""Bytes of a GB, as in the trainers' logs."""

CONTEXT_BYTES = 0.5e9
"""CUDA context, kernels and handles, which PyTorch's allocator does not see. An assumption, not a measurement."""

MEMORY_SETTINGS = (
    "decoder", "decoder_width", "decoder_norm", "skips", "fuse_finest", "mask_ratio", "mask_ratio_low", "bottom_up",
)
"""Settings of pre-training, fields of :class:`HySparKConfig`, that change how much memory a crop takes."""

_GRID = (4, 4, 4)
_SMALL_VOXELS, _LARGE_VOXELS = 2**20, 2**23  # per batch, where activations outweigh weights


def device_bytes(step: StepMemory) -> float:
    """Bytes that a card needs for a step whose tensors were counted.

    On top of the counted tensors: AdamW's two moments, one copy of the largest convolution's input and output (a
    change of memory format or cuDNN's workspace), and :data:`CONTEXT_BYTES`. The optimizer's own step, when all
    activations are gone, needs weights, gradients, moments and temporary tensors: six times the weights.
    """
    moments = 2 * step.weights
    return max(step.peak + step.largest_convolution + moments, 6 * step.weights) + CONTEXT_BYTES


@dataclass(frozen=True)
class Line:
    """Bytes as ``offset + per_voxel * voxels``, voxels counted over the whole batch."""

    offset: float
    per_voxel: float

    def gb(self, patch_size: Sequence[int], batch_size: int) -> float:
        """GB for a batch of patches."""
        return (self.offset + self.per_voxel * volume(patch_size) * batch_size) / GB

    def batch_size(self, patch_size: Sequence[int], target_gb: float) -> int:
        """Largest batch within a target, at least 0."""
        return max(int((target_gb * GB - self.offset) / (self.per_voxel * volume(patch_size))), 0)


class MemoryModel:
    """Peak memory of the two kinds of steps of one network.

    Everything that grows does so with the number of voxels of a batch, masked or not, since the mask ratio is fixed and
    attention does not store its scores. So two traces (:mod:`nnunetv2_hyspark.planning.trace`) per kind of step give
    all patch and batch sizes. They are made at first use.

    Args:
        input_channels: of the images.
        num_classes: segmentation heads.
        arch_kwargs: of :class:`nnunetv2_hyspark.networks.segmentation.HySparKUNet`.
        config: of pre-training.
    """

    def __init__(self, input_channels: int, num_classes: int, arch_kwargs: Mapping[str, Any], config: HySparKConfig):
        self.input_channels = input_channels
        self.num_classes = num_classes
        self.arch_kwargs = arch_kwargs
        self.config = config
        self._lines: dict[str, Line] = {}

    def trace_pretraining(self, patch_size: Sequence[int], crops: int) -> StepMemory:
        """Counted tensors of a pre-training step."""
        return trace_pretraining(self.input_channels, self.arch_kwargs, self.config, patch_size, crops)

    def trace_finetuning(self, patch_size: Sequence[int], crops: int) -> StepMemory:
        """Counted tensors of a fine-tuning step."""
        return trace_finetuning(self.input_channels, self.num_classes, self.arch_kwargs, patch_size, crops)

    @property
    def pretraining(self) -> Line:
        """Of a pre-training step; one that computes its batch in parts counts one part."""
        return self._line("pretraining", self.trace_pretraining)

    @property
    def finetuning(self) -> Line:
        """Of a fine-tuning step."""
        return self._line("finetuning", self.trace_finetuning)

    def _line(self, kind: str, trace: Callable[[Sequence[int], int], StepMemory]) -> Line:
        if kind not in self._lines:
            stride = cumulative_strides(self.arch_kwargs["strides"])[-1]
            patch: Size3 = (_GRID[0] * stride[0], _GRID[1] * stride[1], _GRID[2] * stride[2])
            small, large = (max(round(v / volume(patch)), 1) for v in (_SMALL_VOXELS, _LARGE_VOXELS))
            low, high = (device_bytes(trace(patch, crops)) for crops in (small, large))
            per_voxel = (high - low) / ((large - small) * volume(patch))
            self._lines[kind] = Line(low - per_voxel * small * volume(patch), per_voxel)
        return self._lines[kind]
