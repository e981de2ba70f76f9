"""What a pre-training checkpoint says that a plan for fine-tuning must match."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..geometry import Size3, as_size3, cumulative_strides
from ..networks.segmentation import HySparKUNet
from ..networks.topology import NETWORK_CLASS
from ..transfer.description import as_mapping, description_of
from ..transfer.reading import image_weight, network_weights, read_checkpoint
from ..transfer.rebuilding import check_description, reason_of
from .remembered import RememberedCheckpoint


@dataclass(frozen=True)
class PretrainedSource:
    """A checkpoint and how its images were prepared. What the file does not say is None or empty.

    Attributes:
        file: path and digest.
        arch_kwargs: of :class:`nnunetv2_hyspark.networks.segmentation.HySparKUNet`.
        input_channels: of the network.
        channel_names: one per channel.
        spacing: mm, in the order of the stored arrays, that is after ``transpose_forward``.
        transpose_forward: axes of the images as read, in the order of the stored arrays.
        patch_size: voxels.
        normalization_schemes: nnU-Net's names, one per channel.
        use_mask_for_norm: one per channel.
        intensities: nnU-Net's ``foreground_intensity_properties_per_channel``.
    """

    file: RememberedCheckpoint
    arch_kwargs: dict[str, Any]
    input_channels: int
    channel_names: tuple[str, ...]
    spacing: tuple[float, float, float] | None
    transpose_forward: tuple[int, ...]
    patch_size: Size3 | None
    normalization_schemes: tuple[str, ...]
    use_mask_for_norm: tuple[bool, ...]
    intensities: dict[str, Any]

    @property
    def total_stride(self) -> Size3:
        """Voxels per junction cell and axis."""
        return cumulative_strides(self.arch_kwargs["strides"])[-1]


def read_source(filename: str | os.PathLike[str]) -> PretrainedSource:
    """Reads a checkpoint of HySparK's trainers, or one that ``hyspark import`` made.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or does not describe its network or its data.
    """
    checkpoint = read_checkpoint(filename)
    description = description_of(checkpoint)
    architecture = as_mapping(description.get("architecture"))
    if architecture.get("network_class_name") != NETWORK_CLASS:
        raise ValueError(
            f"{filename} does not describe a HySparK network; expected a checkpoint of HySparKPretrainTrainer, or one "
            f"converted with 'hyspark import'."
        )
    arch_kwargs = dict(as_mapping(architecture.get("arch_kwargs")))
    weights = network_weights(checkpoint, filename)
    first = image_weight(weights)
    if first is None or not arch_kwargs.get("strides"):
        raise ValueError(f"{filename} has no encoder that a plan could name; use a checkpoint of HySparK's.")
    channels = int(first.shape[1])
    try:
        check_description(lambda: HySparKUNet(channels, 2, **arch_kwargs), arch_kwargs, weights)
    except Exception as error:  # what a damaged description makes the network raise has no common ancestor
        raise ValueError(
            f"{filename} does not describe its network ({reason_of(error)}); expected the arch_kwargs of its plans, so "
            f"use another copy of it."
        ) from None
    configuration = as_mapping(description.get("configuration"))
    plans = as_mapping(as_mapping(checkpoint.get("init_args")).get("plans"))
    names = description.get("channel_names")
    spacing, patch = configuration.get("spacing"), configuration.get("patch_size")
    try:
        return PretrainedSource(
            file=RememberedCheckpoint.of(filename),
            arch_kwargs=arch_kwargs,
            input_channels=channels,
            channel_names=tuple(str(n) for n in (names.values() if isinstance(names, Mapping) else names or ())),
            spacing=None if not spacing else (float(spacing[0]), float(spacing[1]), float(spacing[2])),
            transpose_forward=tuple(
                int(a) for a in description.get("transpose_forward") or plans.get("transpose_forward") or (0, 1, 2)
            ),
            patch_size=None if not patch else as_size3(patch, "patch size"),
            normalization_schemes=tuple(str(s) for s in configuration.get("normalization_schemes") or ()),
            use_mask_for_norm=tuple(bool(u) for u in configuration.get("use_mask_for_norm") or ()),
            intensities=dict(as_mapping(
                description.get("foreground_intensity_properties_per_channel")
                or plans.get("foreground_intensity_properties_per_channel")
            )),
        )
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{filename} describes its data in a way that cannot be read ({error}); use another copy of it."
        ) from None
