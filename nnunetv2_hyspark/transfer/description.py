"""What a checkpoint says about itself."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1

CITATIONS = (
    "Tang, F. et al. HySparK: Hybrid Sparse Masking for Large Scale Medical Image Pre-Training. MICCAI 2024.",
    "Isensee, F. et al. nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation. "
    "Nature Methods 18, 203-211 (2021).",
)

_EXCERPT = ("patch_size", "batch_size", "spacing", "normalization_schemes", "use_mask_for_norm")
_PACKAGES = ("nnunetv2-hyspark", "nnunetv2", "torch", "dynamic-network-architectures", "timm", "numpy")


def package_versions() -> dict[str, str]:
    """Installed versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def fingerprint_digest(preprocessed_folder: str | Path) -> str:
    """SHA-256 of a data set's fingerprint, or "unknown" where there is none."""
    path = Path(preprocessed_folder) / "dataset_fingerprint.json"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "unknown"


def as_mapping(value: Any) -> Mapping[str, Any]:
    """``value`` if it is a mapping, else an empty one: entries of a checkpoint from elsewhere may be anything."""
    return value if isinstance(value, Mapping) else {}


def description_of(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The ``"hyspark"`` entry of a checkpoint; empty in files of others."""
    return as_mapping(checkpoint.get("hyspark"))


def excerpt_of(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a plan's configuration: what users compare with their own data."""
    return {key: configuration[key] for key in _EXCERPT if key in configuration}


def check_format(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Accepts files of others, of this format version and of older ones.

    Raises:
        ValueError: if a newer version of this package wrote the file.
    """
    version = format_version(checkpoint)
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has checkpoint format {version}, this version of nnunetv2-hyspark reads up to {FORMAT_VERSION}; "
            "install a newer one."
        )


def format_version(checkpoint: Mapping[str, Any]) -> int:
    """The format version of a checkpoint of ours; 0 for files of others and for files from before there was one."""
    version = description_of(checkpoint).get("format_version")
    return version if isinstance(version, int) else 0


def describe(
    kind: str,
    settings: Mapping[str, Any],
    configuration_name: str,
    configuration: Mapping[str, Any],
    plans: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
    fingerprint: str,
) -> dict[str, Any]:
    """The ``"hyspark"`` entry of a checkpoint: plain values only.

    Spacing is in mm per voxel in the order of the stored arrays, that is after the plan's ``transpose_forward``.
    """
    description = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "settings": settings,
        "architecture": configuration["architecture"],
        "configuration_name": configuration_name,
        "configuration": excerpt_of(configuration),
        "plans_name": plans.get("plans_name"),
        "transpose_forward": plans.get("transpose_forward"),
        "foreground_intensity_properties_per_channel": plans.get("foreground_intensity_properties_per_channel"),
        "axis_order": "(B, C, D, H, W), spatial axes after transpose_forward",
        "dataset_name": plans.get("dataset_name"),
        "dataset_fingerprint_sha256": fingerprint,
        "channel_names": dataset_json.get("channel_names", dataset_json.get("modality")),
        "versions": package_versions(),
        "citations": list(CITATIONS),
    }
    return json.loads(json.dumps(description))
