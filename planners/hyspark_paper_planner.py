"""The preprocessing, patch size and network of HySparK's paper as an nnU-Net plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nnunetv2_hyspark.networks.topology import PAPER_STRIDES, ArchitectureConfig
from nnunetv2_hyspark.normalization.ct_window import CTWindow01Normalization
from nnunetv2_hyspark.planning.fitting import MIN_BATCH, Fit, TargetTooSmall
from nnunetv2_hyspark.planning.memory import MemoryModel
from nnunetv2_hyspark.planning.topology import Topology

from .hyspark_planner import HySparKPlanner

SPACING_MM = 1.5
PATCH_SIZE = (96, 96, 96)
PRETRAINING_BATCH = 8


class HySparKPaperPlanner(HySparKPlanner):
    """Plans ``nnUNetHySparKPaperPlans`` for CT: 1.5 mm, [-175, 250] HU to [0, 1], 96 x 96 x 96 crops, batch 8, 75 %.

    The network is the paper's: widths 32, 64, 128, 256, 384; blocks 1, 1, 3, 3, 1; expansion 2, 4, 4, 4, 2; a ViT
    of depth 3 with 12 heads. The paper's decoder reconstructs, as wide as this library makes it. Where the memory
    target does not hold 8 crops, pre-training computes them in parts (``accumulate``), which gives the same
    gradients. The batch of fine-tuning is what fits, from 2 to 8.
    """

    pretraining_defaults = {"mask_ratio": 0.75, "decoder": "reconstruction"}

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "nnUNetHySparKPaperPlans",
        overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
        suppress_transpose: bool = False,
    ):
        super().__init__(
            dataset_name_or_id, gpu_memory_target_in_gb, preprocessor_name, plans_name,
            overwrite_target_spacing or (SPACING_MM, SPACING_MM, SPACING_MM), suppress_transpose,
        )
        self.architecture = ArchitectureConfig()
        self.lowres_creation_threshold = 0.0  # the paper has one resolution
        others = [name for name in self.channel_names if name.casefold() != "ct"]
        if others:
            raise ValueError(
                f"{self.dataset_name} has the channel(s) {', '.join(others)}, but the paper's preprocessing is for CT "
                f"in Hounsfield units; use -pl HySparKPlanner, or name the channels CT in dataset.json if they are."
            )

    def determine_normalization_scheme_and_whether_mask_is_used_for_norm(self) -> tuple[list[str], list[bool]]:
        """The paper's window for every channel."""
        channels = len(self.channel_names)
        return [CTWindow01Normalization.__name__] * channels, [False] * channels

    def generate_data_identifier(self, configuration_name: str) -> str:
        """Always our own: nobody else preprocesses like this."""
        return f"{self.plans_identifier}_{configuration_name}"

    def plan_topology(self, spacing: Sequence[float], median_shape: Sequence[float]) -> Topology:
        """The paper's, whatever the images are."""
        return Topology(PAPER_STRIDES, ((3, 3, 3),) * len(PAPER_STRIDES))

    def fit(
        self, model: MemoryModel, stride: Sequence[int], spacing: Sequence[float], median_shape: Sequence[float],
        max_voxels: float,
    ) -> Fit:
        """The paper's crops; raises TargetTooSmall if not even a single one fits for pre-training, or two for
        fine-tuning."""
        target = self.UNet_vram_target_GB
        needed = max(model.pretraining.gb(PATCH_SIZE, 1), model.finetuning.gb(PATCH_SIZE, MIN_BATCH))
        if needed > target:
            needed = float(np.ceil(needed * 10) / 10)
            raise TargetTooSmall(
                f"the paper's crops of 96x96x96 voxels need about {needed:.1f} GB ({MIN_BATCH} of them in "
                f"fine-tuning), but the memory target is {target:g} GB; plan with -gpu_memory_target {needed:.1f} or "
                f"more, or with -pl HySparKPlanner, which chooses smaller crops.",
                needed,
            )
        part = PRETRAINING_BATCH // self._parts(model)
        finetuning = min(max(model.finetuning.batch_size(PATCH_SIZE, target), MIN_BATCH), PRETRAINING_BATCH)
        return Fit(
            PATCH_SIZE, PRETRAINING_BATCH, finetuning,
            model.pretraining.gb(PATCH_SIZE, part), model.finetuning.gb(PATCH_SIZE, finetuning),
        )

    def _parts(self, model: MemoryModel) -> int:
        """In how many parts the batch must be computed to fit."""
        fitting = model.pretraining.batch_size(PATCH_SIZE, self.UNet_vram_target_GB)
        return next(parts for parts in (1, 2, 4, 8) if PRETRAINING_BATCH // parts <= max(fitting, 1))

    def hyspark_block(self, model: MemoryModel, fit: Fit) -> dict[str, Any]:
        """Settings, batch size and parts."""
        block = super().hyspark_block(model, fit)
        block["pretraining"]["accumulate"] = self._parts(model)
        return block
