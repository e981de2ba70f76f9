"""A preprocessed nnU-Net data set of tiny synthetic images, written without nnU-Net's preprocessing."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import blosc2
import numpy as np

NAME = "Dataset997_Small"
SETTINGS = (
    "base_width=4,head_width=4,max_stride=4,pretraining.epochs=3,iterations_per_epoch=3,val_iterations_per_epoch=2,"
    "preview_every=0,warmup_epochs=0"
)


def smooth_image(rng: np.random.Generator, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A bright ball (label 1) in a noisy gradient: float32 ``(1, D, H, W)`` and int8 labels of that shape."""
    axes = np.meshgrid(*(np.linspace(-1, 1, extent) for extent in shape), indexing="ij")
    centre = rng.uniform(-0.3, 0.3, 3)
    ball = sum((axis - c) ** 2 for axis, c in zip(axes, centre)) < 0.25
    image = axes[0] + 2.0 * ball + 0.2 * rng.standard_normal(shape)
    return image[None].astype(np.float32), ball[None].astype(np.int8)


def write_small_dataset(
    preprocessed: Path, n_cases: int = 10, batch_size: int = 2, shape: tuple[int, int, int] = (20, 16, 18)
) -> Path:
    """Writes ``nnUNetPlans`` with configuration ``3d_fullres`` (patch 16^3, three stages) and returns its folder."""
    base = preprocessed / NAME
    folder = base / "nnUNetPlans_3d_fullres"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(n_cases):
        image, labels = smooth_image(rng, shape)
        for suffix, array in (("", image), ("_seg", labels)):
            blosc2.asarray(np.ascontiguousarray(array), urlpath=str(folder / f"case_{number:02d}{suffix}.b2nd"))
        properties = {"class_locations": {1: np.argwhere(labels == 1)}, "spacing": [1, 1, 1]}
        (folder / f"case_{number:02d}.pkl").write_bytes(pickle.dumps(properties))
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": batch_size,
        "patch_size": [16, 16, 16],
        "median_image_size_in_voxels": list(map(float, shape)),
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": resampling,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {"strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]], "kernel_sizes": [[3, 3, 3]] * 3},
            "_kw_requires_import": [],
        },
        "batch_dice": False,
    }
    plans = {
        "dataset_name": NAME,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": list(shape),
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {}},
    }
    dataset = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "ball": 1},
        "numTraining": n_cases,
        "file_ending": ".nii.gz",
    }
    (base / "nnUNetPlans.json").write_text(json.dumps(plans))
    (base / "dataset.json").write_text(json.dumps(dataset))
    (base / "dataset_fingerprint.json").write_text("{}")
    return base
