"""nnU-Net's planning with the hybrid network named in the plans."""

from __future__ import annotations

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnunetv2_hyspark.networks.topology import architecture_of
from nnunetv2_hyspark.training.settings import resolve_settings


class HySparKPlanner(ExperimentPlanner):
    """Plans ``nnUNetHySparKPlans``: nnU-Net's spacing, patch and batch size, HySparK's network for 3D configurations.

    The patch is divisible by nnU-Net's own strides, of which the hybrid network uses the first; so it is divisible by
    the network's strides. Preprocessed data of the plain nnU-Net plans are shared, since they are the same. Architecture
    settings in the variable ``nnUNet_hyspark`` go into the plans.
    """

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "nnUNetHySparKPlans",
        overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
        suppress_transpose: bool = False,
    ):
        super().__init__(
            dataset_name_or_id, gpu_memory_target_in_gb, preprocessor_name, plans_name, overwrite_target_spacing,
            suppress_transpose,
        )

    def generate_data_identifier(self, configuration_name: str) -> str:
        """``nnUNetPlans_<configuration>`` where the data are the same as the default planner's."""
        if configuration_name in ("2d", "3d_fullres") and self.overwrite_target_spacing is None:
            return f"nnUNetPlans_{configuration_name}"
        return f"{self.plans_identifier}_{configuration_name}"

    def get_plans_for_configuration(self, spacing, median_shape, data_identifier, approximate_n_voxels_dataset, _cache):
        """nnU-Net's configuration with HySparK's network in place of the U-Net if it is 3D."""
        plan = super().get_plans_for_configuration(
            spacing, median_shape, data_identifier, approximate_n_voxels_dataset, _cache
        )
        if len(plan["patch_size"]) == 3:
            settings = resolve_settings({}, data_identifier, "pretraining")
            plan["architecture"] = architecture_of(plan, settings.architecture)
        return plan
