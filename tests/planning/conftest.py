"""Data sets that exist as a fingerprint only, and a cache of memory models, which take seconds to make."""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunetv2_hyspark.networks.segmentation import HySparKUNet
from nnunetv2_hyspark.networks.topology import NETWORK_CLASS, ArchitectureConfig, derive_arch_kwargs
from nnunetv2_hyspark.planning.topology import plan_topology
from nnunetv2_hyspark.transfer.description import FORMAT_VERSION


@dataclass(frozen=True)
class Folders:
    """nnU-Net's folders of one test."""

    raw: Path
    preprocessed: Path
    results: Path

    def plans(self, dataset: str, name: str) -> dict:
        """A plans file."""
        return json.loads((self.preprocessed / dataset / f"{name}.json").read_text())


@pytest.fixture
def folders(tmp_path, monkeypatch, point_nnunet_to):
    """Empty folders, and the variables that name them."""
    monkeypatch.delenv("nnUNet_hyspark", raising=False)
    made = []
    for name in ("raw", "preprocessed", "results"):
        folder = tmp_path / f"nnUNet_{name}"
        folder.mkdir()
        point_nnunet_to(f"nnUNet_{name}", folder)
        made.append(folder)
    return Folders(*made)


@pytest.fixture
def make_dataset(folders):
    """Makes a data set of which only the fingerprint matters; shape in voxels and spacing in mm as nnU-Net reads."""

    def make(number, name, shape, spacing, channels, cases=20):
        dataset = f"Dataset{number:03d}_{name}"
        raw = folders.raw / dataset
        for inner in ("imagesTr", "labelsTr"):
            (raw / inner).mkdir(parents=True)
        empty = sitk.GetImageFromArray(np.zeros((4, 4, 4), np.float32))
        for channel in range(len(channels)):
            sitk.WriteImage(empty, str(raw / "imagesTr" / f"case_{channel:04d}.nii.gz"))
        sitk.WriteImage(sitk.Cast(empty, sitk.sitkUInt8), str(raw / "labelsTr" / "case.nii.gz"))
        (raw / "dataset.json").write_text(json.dumps({
            "channel_names": {str(i): c for i, c in enumerate(channels)},
            "labels": {"background": 0, "organ": 1, "lesion": 2},
            "numTraining": cases,
            "file_ending": ".nii.gz",
        }))
        intensities = {
            "mean": 40.0, "std": 120.0, "median": 45.0, "min": -1000.0, "max": 2000.0, "percentile_00_5": -900.0,
            "percentile_99_5": 900.0,
        }
        preprocessed = folders.preprocessed / dataset
        preprocessed.mkdir(parents=True)
        (preprocessed / "dataset_fingerprint.json").write_text(json.dumps({
            "spacings": [list(spacing)] * cases,
            "shapes_after_crop": [list(shape)] * cases,
            "median_relative_size_after_cropping": 1.0,
            "foreground_intensity_properties_per_channel": {str(i): intensities for i in range(len(channels))},
        }))
        return dataset

    return make


@pytest.fixture(scope="session")
def _memory_models():
    return {}


@pytest.fixture(autouse=True)
def shared_memory_models(_memory_models, monkeypatch):
    """Planners of all tests share their memory models."""
    from nnunetv2_hyspark.planners.hyspark_planner import HySparKPlanner

    make = HySparKPlanner.memory_model

    def memory_model(self, arch_kwargs):
        sizes = len(self.channel_names), len(self.dataset_json["labels"])
        key = json.dumps([arch_kwargs, sizes, str(self.pretraining)])
        if key not in _memory_models:
            _memory_models[key] = make(self, arch_kwargs)
        return _memory_models[key]

    monkeypatch.setattr(HySparKPlanner, "memory_model", memory_model)


def small_arch_kwargs(spacing=(1.0, 1.0, 1.0), cnn="mednext"):
    """A small network for images of this spacing, mm."""
    config = ArchitectureConfig(
        base_width=6, junction_width=24, head_width=12, max_stride=8, transformer_depth=1, cnn=cnn
    )
    topology = plan_topology(spacing, (64, 64, 64), config.max_stride)
    return derive_arch_kwargs(topology.strides, topology.kernel_sizes, config)


@pytest.fixture
def make_checkpoint(tmp_path):
    """Writes a pre-training checkpoint as the trainer's, with changes to what it says about its data."""

    def make(name="checkpoint_final.pth", channels=1, cnn="mednext", **changes):
        description = {
            "spacing": [1.5, 1.5, 1.5], "patch_size": [48, 48, 48], "normalization_schemes": ["CTNormalization"],
            "use_mask_for_norm": [False], "transpose_forward": [0, 1, 2], "channel_names": {"0": "CT"}, **changes,
        }
        kwargs = small_arch_kwargs(description["spacing"] or (1, 1, 1), cnn)
        torch.manual_seed(0)
        network = HySparKUNet(channels, 2, **kwargs)
        in_configuration = ("spacing", "patch_size", "normalization_schemes", "use_mask_for_norm")
        checkpoint = {
            "network_weights": network.state_dict(),
            "hyspark": {
                "format_version": FORMAT_VERSION,
                "kind": "pretraining",
                "architecture": {"network_class_name": NETWORK_CLASS, "arch_kwargs": kwargs, "_kw_requires_import": []},
                "configuration": {k: description[k] for k in in_configuration if description[k] is not None},
                "transpose_forward": description["transpose_forward"],
                "channel_names": description["channel_names"],
                "foreground_intensity_properties_per_channel": {
                    "0": {"mean": -7.0, "std": 333.0, "percentile_00_5": -999.0, "percentile_99_5": 888.0},
                },
            },
        }
        path = tmp_path / name
        torch.save(checkpoint, path)
        return path

    return make
