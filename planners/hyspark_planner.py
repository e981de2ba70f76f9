"""nnU-Net's planning for the hybrid network and a GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnunetv2_hyspark.networks.topology import NETWORK_CLASS, derive_arch_kwargs
from nnunetv2_hyspark.planning.fitting import Fit, fit
from nnunetv2_hyspark.planning.memory import MEMORY_SETTINGS, MemoryModel
from nnunetv2_hyspark.planning.patch import initial_patch, patch_candidates
from nnunetv2_hyspark.planning.sharing import shares_data
from nnunetv2_hyspark.planning.topology import Topology, plan_topology
from nnunetv2_hyspark.training.settings import resolve_settings
from nnunetv2_hyspark.user_errors import show_user_errors_as_sentences

STOCK_PLANS = "nnUNetPlans"


class HySparKPlanner(ExperimentPlanner):
    """Plans ``nnUNetHySparKPlans``: HySparK's network for 3D configurations, nnU-Net's own for 2D.

    Spacing, resampling and normalization are nnU-Net's. Strides give junction cells of about equal edges in mm; the
    patch is the largest with which both pre-training and fine-tuning fit ``gpu_memory_target_in_gb``; their batch sizes
    follow, fine-tuning's as the configuration's ``batch_size``, pre-training's in its ``"hyspark"`` block. Settings of
    the architecture and of pre-training in the variable ``nnUNet_hyspark`` are respected.

    Attributes:
        pretraining_defaults: settings of pre-training that hold unless ``nnUNet_hyspark`` says otherwise.
    """

    pretraining_defaults: Mapping[str, Any] = {}

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "nnUNetHySparKPlans",
        overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
        suppress_transpose: bool = False,
    ):
        show_user_errors_as_sentences()
        super().__init__(
            dataset_name_or_id, gpu_memory_target_in_gb, preprocessor_name, plans_name, overwrite_target_spacing,
            suppress_transpose,
        )
        defaults = {"hyspark": {"pretraining": self.pretraining_defaults}}
        settings = resolve_settings(defaults, plans_name, "pretraining")
        self.architecture = settings.architecture
        self.pretraining = settings.pretraining
        self.memory_models: dict[str, MemoryModel] = {}

    def generate_data_identifier(self, configuration_name: str) -> str:
        """``nnUNetPlans_<configuration>`` where stock nnU-Net's preprocessed data are the same, else our own."""
        plans = Path(nnUNet_preprocessed) / self.dataset_name / f"{STOCK_PLANS}.json"
        return shares_data(self, plans, configuration_name) or f"{self.plans_identifier}_{configuration_name}"

    def plan_topology(self, spacing: Sequence[float], median_shape: Sequence[float]) -> Topology:
        """Strides and kernel sizes for images of this spacing (mm) and size (voxels)."""
        return plan_topology(spacing, initial_patch(spacing, median_shape), self.architecture.max_stride)

    def arch_kwargs(self, topology: Topology) -> dict[str, Any]:
        """``arch_kwargs`` of the network."""
        return derive_arch_kwargs(topology.strides, topology.kernel_sizes, self.architecture)

    def fit(
        self, model: MemoryModel, stride: Sequence[int], spacing: Sequence[float], median_shape: Sequence[float],
        max_voxels: float,
    ) -> Fit:
        """Patch and batch sizes within the memory target; see :mod:`nnunetv2_hyspark.planning.fitting`."""
        candidates = patch_candidates(initial_patch(spacing, median_shape), stride, median_shape)
        return fit(model, candidates, self.UNet_vram_target_GB, max_voxels)

    def hyspark_block(self, model: MemoryModel, fit: Fit) -> dict[str, Any]:
        """The configuration's ``"hyspark"`` block: settings, and what the memory model says: GB, and for which."""
        return {
            "pretraining": {**self.pretraining_defaults, "batch_size": fit.pretraining_batch},
            "memory": {
                "target_gb": float(self.UNet_vram_target_GB),
                "pretraining_gb": round(fit.pretraining_gb, 2),
                "finetuning_gb": round(fit.finetuning_gb, 2),
                "pretraining": {key: getattr(self.pretraining, key) for key in MEMORY_SETTINGS},
            },
        }

    @property
    def channel_names(self) -> list[str]:
        """One per image channel."""
        return list(self.dataset_json.get("channel_names", self.dataset_json.get("modality")).values())

    def memory_model(self, arch_kwargs: dict[str, Any]) -> MemoryModel:
        """Of a network, made once."""
        key = json.dumps(arch_kwargs)
        if key not in self.memory_models:
            labels = len([name for name in self.dataset_json["labels"] if name != "ignore"])
            self.memory_models[key] = MemoryModel(len(self.channel_names), labels, arch_kwargs, self.pretraining)
        return self.memory_models[key]

    def get_plans_for_configuration(self, spacing, median_shape, data_identifier, approximate_n_voxels_dataset, _cache):
        """nnU-Net's own if it is 2D; if it is 3D, our network, patch and batch sizes.

        Raises:
            ValueError: if the smallest network does not fit the memory target (the message says what does), or the
                images are too small.
        """
        if len(spacing) == 2:
            return super().get_plans_for_configuration(
                spacing, median_shape, data_identifier, approximate_n_voxels_dataset, _cache
            )
        topology = self.plan_topology(spacing, median_shape)
        arch_kwargs = self.arch_kwargs(topology)
        model = self.memory_model(arch_kwargs)
        max_voxels = approximate_n_voxels_dataset * self.max_dataset_covered
        fit = self.fit(model, topology.total_stride, spacing, median_shape, max_voxels)
        data_fn, data_kwargs, seg_fn, seg_kwargs = self.determine_resampling()
        export_fn, export_kwargs = self.determine_segmentation_softmax_export_fn()
        schemes, use_mask = self.determine_normalization_scheme_and_whether_mask_is_used_for_norm()
        return {
            "data_identifier": data_identifier,
            "preprocessor_name": self.preprocessor_name,
            "batch_size": fit.finetuning_batch,
            "patch_size": fit.patch_size,
            "median_image_size_in_voxels": median_shape,
            "spacing": spacing,
            "normalization_schemes": schemes,
            "use_mask_for_norm": use_mask,
            "resampling_fn_data": data_fn.__name__,
            "resampling_fn_seg": seg_fn.__name__,
            "resampling_fn_data_kwargs": data_kwargs,
            "resampling_fn_seg_kwargs": seg_kwargs,
            "resampling_fn_probabilities": export_fn.__name__,
            "resampling_fn_probabilities_kwargs": export_kwargs,
            "architecture": {
                "network_class_name": NETWORK_CLASS, "arch_kwargs": arch_kwargs, "_kw_requires_import": [],
            },
            "hyspark": self.hyspark_block(model, fit),
        }

    def preprocessing(self, configuration_name: str) -> dict[str, Any]:
        """What decides how images look after preprocessing, as plain values; compared to tell whether data are shared.

        Spacing is in mm, in the order of the stored arrays.
        """
        forward, _ = self.determine_transpose()
        spacing = np.asarray(self.determine_fullres_target_spacing())[list(forward)]
        data_fn, data_kwargs, seg_fn, seg_kwargs = self.determine_resampling()
        schemes, use_mask = self.determine_normalization_scheme_and_whether_mask_is_used_for_norm()
        described = {
            "transpose_forward": list(forward),
            "foreground_intensity_properties_per_channel":
                self.dataset_fingerprint["foreground_intensity_properties_per_channel"],
            "preprocessor_name": self.preprocessor_name,
            "spacing": spacing[1:] if configuration_name == "2d" else spacing,
            "normalization_schemes": schemes,
            "use_mask_for_norm": use_mask,
            "resampling_fn_data": data_fn.__name__,
            "resampling_fn_seg": seg_fn.__name__,
            "resampling_fn_data_kwargs": data_kwargs,
            "resampling_fn_seg_kwargs": seg_kwargs,
        }
        recursive_fix_for_json_export(described)
        return described
