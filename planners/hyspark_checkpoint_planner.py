"""Plans for a labelled data set that match a pre-trained checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnunetv2_hyspark.geometry import as_size3
from nnunetv2_hyspark.planning.fitting import Fit, fit_batch, fit_patch
from nnunetv2_hyspark.planning.matching import Normalization, match_axes, match_normalization
from nnunetv2_hyspark.planning.memory import MemoryModel
from nnunetv2_hyspark.planning.patch import initial_patch, patch_candidates
from nnunetv2_hyspark.planning.remembered import KEY
from nnunetv2_hyspark.planning.source import PretrainedSource, read_source
from nnunetv2_hyspark.planning.topology import Topology

from .hyspark_planner import HySparKPlanner

CONFIGURATION = "3d_fullres"


class HySparKCheckpointPlanner(HySparKPlanner):
    """Plans fine-tuning of a checkpoint; made by ``hyspark plan-finetune``, not by ``-pl``.

    Network and axes are the checkpoint's, and so are spacing, normalization and patch size unless chosen otherwise. The
    patch is cut to the target's images, and made smaller where the memory target asks for it.

    Args:
        dataset_name_or_id: the labelled data set; it must have a fingerprint.
        gpu_memory_target_in_gb: of the GPU for fine-tuning.
        preprocessor_name, plans_name, overwrite_target_spacing, suppress_transpose: as nnU-Net's planners.
        source: the checkpoint.
        spacing: ``pretrained`` or ``default`` (nnU-Net's choice for the target); ``overwrite_target_spacing`` wins.
        normalization: ``pretrained`` or ``default``.

    Attributes:
        notes: remarks for the user.

    Raises:
        ValueError: if the checkpoint does not say what is asked of it, or does not suit the target.
    """

    pretraining_defaults = {"decoder": "reconstruction"}
    """Nothing is planned for pre-training: its settings in the variable are those of another command, and with this
    decoder all of them are possible."""

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "nnUNetHySparKFinetunePlans",
        overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
        suppress_transpose: bool = False,
        source: PretrainedSource | None = None,
        spacing: str = "pretrained",
        normalization: str = "pretrained",
    ):
        if source is None:
            raise ValueError(
                "HySparKCheckpointPlanner plans for a checkpoint, which -pl cannot name; use hyspark plan-finetune "
                "-d TARGET --from CHECKPOINT."
            )
        super().__init__(
            dataset_name_or_id, gpu_memory_target_in_gb, preprocessor_name, plans_name, overwrite_target_spacing,
            suppress_transpose,
        )
        self.source = source
        self.keeps_spacing = spacing == "pretrained" and overwrite_target_spacing is None
        self.notes: list[str] = []
        if self.keeps_spacing and source.spacing is None:
            raise ValueError(
                f"{source.file.path} does not tell the spacing it was pre-trained at; use --spacing default, or "
                f"--spacing X Y Z in mm."
            )
        self.lowres_creation_threshold = 0.0  # one configuration, the one that matches
        schemes, use_mask = super().determine_normalization_scheme_and_whether_mask_is_used_for_norm()
        intensities = self.dataset_fingerprint["foreground_intensity_properties_per_channel"]
        default = Normalization(schemes, use_mask, intensities)
        self.normalization = match_normalization(source, self.channel_names, default, normalization)
        self.notes += self.normalization.notes
        self.forward = self._axes()

    def _axes(self) -> list[int]:
        forward, _ = super().determine_transpose()
        if not self.keeps_spacing:
            return [int(axis) for axis in forward]
        native = np.median(np.vstack(self.dataset_fingerprint["spacings"]), 0)
        target_forward = [int(np.argmax(native)), *[a for a in range(3) if a != int(np.argmax(native))]]
        axes, notes = match_axes(self.source, target_forward, native.tolist(), self.anisotropy_threshold)
        self.notes += notes
        return axes

    def determine_transpose(self) -> tuple[list[int], list[int]]:
        """The checkpoint's order of axes, or the target's where the spacing is its own."""
        if not hasattr(self, "forward"):
            return super().determine_transpose()
        return self.forward, [self.forward.index(axis) for axis in range(3)]

    def determine_fullres_target_spacing(self) -> np.ndarray:
        """mm, in the order images are read."""
        keeps = getattr(self, "keeps_spacing", False) and hasattr(self, "forward")
        spacing = self.source.spacing if keeps else None
        if spacing is None:
            return super().determine_fullres_target_spacing()
        return np.array([spacing[self.forward.index(axis)] for axis in range(3)])

    def determine_normalization_scheme_and_whether_mask_is_used_for_norm(self) -> tuple[list[str], list[bool]]:
        """As matched."""
        return self.normalization.schemes, self.normalization.use_mask

    def generate_data_identifier(self, configuration_name: str) -> str:
        """Always our own."""
        return f"{self.plans_identifier}_{configuration_name}"

    def plan_topology(self, spacing: Sequence[float], median_shape: Sequence[float]) -> Topology:
        """The checkpoint's."""
        kwargs = self.source.arch_kwargs
        strides, kernels = (tuple(as_size3(v) for v in kwargs[key]) for key in ("strides", "kernel_sizes"))
        return Topology(strides, kernels)

    def arch_kwargs(self, topology: Topology) -> dict[str, Any]:
        """The checkpoint's."""
        return dict(self.source.arch_kwargs)

    def fit(
        self, model: MemoryModel, stride: Sequence[int], spacing: Sequence[float], median_shape: Sequence[float],
        max_voxels: float,
    ) -> Fit:
        """The checkpoint's patch, as far as images and memory allow; only fine-tuning has to fit."""
        first = initial_patch(spacing, median_shape)
        if self.source.patch_size is not None:
            first = [min(p, round(m)) for p, m in zip(self.source.patch_size, median_shape)]
        candidates = patch_candidates(first, stride, median_shape)
        line, target = model.finetuning, self.UNet_vram_target_GB
        patch = fit_patch([line], candidates, target, "pre-train a smaller network")
        if self.source.patch_size is not None and patch != self.source.patch_size:
            why = "the memory target" if patch != candidates[0] else "the size of the target's images"
            self.notes.append(
                f"patches are {'x'.join(map(str, patch))} voxels instead of "
                f"{'x'.join(map(str, self.source.patch_size))} as in pre-training, because of {why}"
            )
        batch = fit_batch(line, patch, target, max_voxels)
        return Fit(patch, 0, batch, 0.0, line.gb(patch, batch))

    def hyspark_block(self, model: MemoryModel, fit: Fit) -> dict[str, Any]:
        """The checkpoint, and what the memory model says."""
        memory = {"target_gb": float(self.UNet_vram_target_GB), "finetuning_gb": round(fit.finetuning_gb, 2)}
        return {KEY: {"path": self.source.file.path, "sha256": self.source.file.sha256}, "memory": memory}

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Writes the one configuration that matches the checkpoint, with the intensities it was normalised by.

        Raises:
            ValueError: if the images are 2D.
        """
        if CONFIGURATION not in plans["configurations"]:
            raise ValueError(f"{self.dataset_name} holds 2D images; HySparK networks are 3D, so use 3D images.")
        plans["configurations"] = {CONFIGURATION: plans["configurations"][CONFIGURATION]}
        plans["foreground_intensity_properties_per_channel"] = self.normalization.intensities
        recursive_fix_for_json_export(plans)
        folder = Path(nnUNet_preprocessed) / self.dataset_name
        save_json(plans, str(folder / f"{self.plans_identifier}.json"), sort_keys=False)


def check_target(dataset_name_or_id: str, plans_name: str) -> tuple[str, str]:
    """Full name of a data set that can be planned, and the name of the plans without ``.json``.

    Raises:
        ValueError: if there is no such data set, no fingerprint, or the plans' name belongs to other plans.
    """
    name = plans_name.removesuffix(".json")
    try:
        dataset = maybe_convert_to_dataset_name(
            int(dataset_name_or_id) if dataset_name_or_id.isdigit() else dataset_name_or_id
        )
    except RuntimeError as error:
        raise ValueError(f"data set {dataset_name_or_id} was not found ({' '.join(str(error).split())})") from None
    if not (Path(nnUNet_raw) / dataset / "dataset.json").is_file():
        raise ValueError(f"{Path(nnUNet_raw) / dataset} has no dataset.json; give the id of an nnU-Net data set.")
    folder = Path(nnUNet_preprocessed) / dataset
    if not (folder / "dataset_fingerprint.json").is_file():
        number = dataset.removeprefix("Dataset").partition("_")[0]
        raise ValueError(
            f"{dataset} has no fingerprint in {folder}; run nnUNetv2_extract_fingerprint -d {int(number)} first."
        )
    existing = folder / f"{name}.json"
    if existing.is_file():
        planner = load_json(str(existing)).get("experiment_planner_used")
        if planner != HySparKCheckpointPlanner.__name__:
            raise ValueError(f"{existing} holds plans of {planner}; give the new ones another name with -p.")
    return dataset, name


def plan_finetuning(
    dataset: str,
    checkpoint: str,
    plans_name: str,
    gpu_memory_target_in_gb: float,
    spacing: str = "pretrained",
    spacing_mm: list[float] | None = None,
    normalization: str = "pretrained",
) -> HySparKCheckpointPlanner:
    """Plans and writes; see :class:`HySparKCheckpointPlanner`.

    Returns:
        The planner, with its ``plans`` and ``notes``.
    """
    planner = HySparKCheckpointPlanner(
        dataset, gpu_memory_target_in_gb, plans_name=plans_name, overwrite_target_spacing=spacing_mm,
        source=read_source(checkpoint), spacing=spacing, normalization=normalization,
    )
    planner.plan_experiment()
    return planner
