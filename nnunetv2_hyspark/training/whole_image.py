"""Reconstruction of a whole image from a file, with the network, plan and preprocessing that a checkpoint holds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_file_ending
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from ..configuration import check_value
from ..geometry import Size3, as_size3
from ..pretext.build import build_hyspark
from ..pretext.hyspark import HySparK, HySparKConfig
from ..transfer.description import as_mapping
from ..transfer.reading import network_weights, read_checkpoint
from ..transfer.rebuilding import check_description, reason_of
from .reconstruction import Reconstruction, reconstruct

FEWEST_FOR_FIT = 2

LARGEST_PATCH = 1024
"""Voxels per axis of a patch that a checkpoint may ask for."""

LARGEST_SPACING = 1e5
"""mm; nothing imaged is sampled that coarsely."""


@dataclass(frozen=True)
class PretrainedModel:
    """What a pre-training checkpoint is made of."""

    network: HySparK
    plans: PlansManager
    configuration: ConfigurationManager
    dataset_json: dict[str, Any]
    options: HySparKConfig

    @property
    def patch_size(self) -> Size3:
        """Voxels of a crop per axis."""
        return as_size3(self.configuration.patch_size)


@dataclass(frozen=True)
class PreparedImage:
    """An image as the plan prepares it, and what is needed to go back.

    Attributes:
        data: float32 ``(C, D, H, W)``, preprocessed.
        raw: ``(C, D, H, W)`` as read.
        properties: of nnU-Net's reader and preprocessor.
    """

    data: np.ndarray
    raw: np.ndarray
    properties: dict[str, Any]


def load_pretrained_model(filename: str | os.PathLike[str], device: torch.device) -> PretrainedModel:
    """Rebuilds the network of a pre-training checkpoint, in evaluation mode.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, was not written by pre-training, or does not describe its network.
    """
    checkpoint = read_checkpoint(filename)
    description = checkpoint.get("hyspark")
    if not isinstance(description, dict) or description.get("kind") != "pretraining" or "init_args" not in checkpoint:
        raise ValueError(f"{filename} is not a checkpoint of HySparKPretrainTrainer; give one that pre-training wrote.")
    weights = network_weights(checkpoint, filename)
    try:
        return _rebuild(checkpoint["init_args"], weights, device)
    except Exception as error:  # what a damaged description makes nnU-Net and torch raise has no common ancestor
        raise ValueError(
            f"{filename} does not describe its network ({reason_of(error)}); expected the plans and settings that "
            f"pre-training writes, so use another copy of it."
        ) from None


def _rebuild(
    arguments: Mapping[str, Any], weights: Mapping[str, torch.Tensor], device: torch.device
) -> PretrainedModel:
    """The model from a trainer's ``init_args`` and weights; raises anything where they make no sense."""
    plans = PlansManager(dict(as_mapping(arguments["plans"])))
    configuration = plans.get_configuration(arguments["configuration"])
    stored = configuration.configuration["hyspark"]["pretraining"]
    values = {
        field.name: check_value(field, stored[field.name], field.name, "the checkpoint")
        for field in fields(HySparKConfig)
        if field.name in stored
    }
    options = HySparKConfig(**{"decoder": "reconstruction", **values})  # the decoder of files that name none
    channels = determine_num_input_channels(plans, configuration, arguments["dataset_json"])
    kwargs = configuration.network_arch_init_kwargs
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("decoder.")}
    check_description(lambda: build_hyspark(channels, kwargs, options), kwargs, kept, ("",))
    network = build_hyspark(channels, kwargs, options)
    network.load_state_dict(kept)
    model = PretrainedModel(network.to(device).eval(), plans, configuration, arguments["dataset_json"], options)
    _check_preparation(model, channels)
    return model


def _check_preparation(model: PretrainedModel, channels: int) -> None:
    """Raises ValueError, or anything, if the plan does not say how to prepare an image for the network."""
    plans, configuration = model.plans, model.configuration
    model.network.encoder.grid(model.patch_size)
    if max(model.patch_size) > LARGEST_PATCH:
        raise ValueError(f"its patch size is {model.patch_size}, at most {LARGEST_PATCH} voxels per axis are expected")
    forward, backward = list(plans.transpose_forward), list(plans.transpose_backward)
    if sorted(forward) != [0, 1, 2] or [forward[axis] for axis in backward] != [0, 1, 2]:
        raise ValueError(f"its axes are transposed by {forward} and back by {backward}")
    spacing = [float(edge) for edge in configuration.spacing]
    if len(spacing) != 3 or not all(0 < edge < LARGEST_SPACING for edge in spacing):
        raise ValueError(f"its spacing is {spacing} mm")
    for key in ("normalization_schemes", "use_mask_for_norm"):
        if len(getattr(configuration, key)) != channels:
            raise ValueError(f"its {key} are {getattr(configuration, key)} for {channels} channel(s)")


def prepare_image(model: PretrainedModel, files: Sequence[str | os.PathLike[str]]) -> PreparedImage:
    """Reads an image and preprocesses it as the plan says.

    Args:
        model: whose plan.
        files: one per channel; any format that nnU-Net reads. 2D images count as one slice of the plan's thickness.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if nnU-Net cannot read it, or it has another number of channels.
    """
    paths = [Path(file) for file in files]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"there is no image {path}; give the path of an image file.")
    ending = ".nii.gz" if paths[0].name.endswith(".nii.gz") else paths[0].suffix
    try:
        # nnU-Net prints the traceback of every reader that it tries in vain
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            reader = determine_reader_writer_from_file_ending(
                ending, str(paths[0]), allow_nonmatching_filename=True, verbose=False
            )
            raw, properties = reader().read_images([str(path) for path in paths])
    except Exception as error:  # what the readers' libraries raise has no common ancestor
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{paths[0]} cannot be read ({reason}); give a format that nnU-Net reads, such as .nii.gz or .png."
        ) from None
    if not np.isfinite(raw).all():
        raise ValueError(f"{paths[0]} holds NaN or infinite voxels; expected finite intensities, so repair it.")
    expected = model.network.encoder.input_channels
    if raw.shape[0] != expected:
        raise ValueError(
            f"{paths[0]} has {raw.shape[0]} channel(s), the checkpoint was trained on {expected}; give one file per "
            f"channel, or a gray image for one."
        )
    if raw.shape[1] == 1:
        # nnU-Net marks 2D images with a huge spacing, which a 3D plan would take literally
        axis = list(model.plans.transpose_forward).index(0)
        properties["spacing"] = [model.configuration.spacing[axis], *list(properties["spacing"])[1:]]
    try:
        preprocessor = model.configuration.preprocessor_class(verbose=False)
        data, _, properties = preprocessor.run_case_npy(
            raw, None, properties, model.plans, model.configuration, model.dataset_json
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the plan in the checkpoint cannot prepare {paths[0]} ({reason_of(error)}); use another copy of it."
        ) from error
    return PreparedImage(np.asarray(data, dtype=np.float32), raw, properties)


def reconstruct_whole(
    model: PretrainedModel, image: np.ndarray, mask_ratio: float, seed: int, device: torch.device
) -> Reconstruction:
    """Reconstructs an image of any size in tiles of the patch size, each with its own mask.

    Args:
        model: network and patch size.
        image: float32 ``(C, D, H, W)``, preprocessed.
        mask_ratio: fraction of hidden cells.
        seed: of the masks.
        device: where to compute.
    """
    patch, shape = model.patch_size, image.shape[1:]
    missing = [-extent % edge for extent, edge in zip(shape, patch)]
    before = [gap // 2 for gap in missing]
    padded = np.pad(image, [(0, 0), *((b, gap - b) for b, gap in zip(before, missing))])
    restored, visible = np.empty_like(padded), np.empty(padded.shape[1:], dtype=bool)
    losses = []
    starts = product(*(range(0, extent, edge) for extent, edge in zip(padded.shape[1:], patch)))
    for index, start in enumerate(starts):
        tile = tuple(slice(s, s + edge) for s, edge in zip(start, patch))
        mask_seed = int(np.random.default_rng((seed, index)).integers(2**62))
        all_channels = (slice(None), *tile)
        part = reconstruct(model.network, padded[all_channels], mask_ratio, mask_seed, device)
        restored[all_channels] = part.restored
        visible[tile] = part.visible
        losses.append(part.loss)
    inside = tuple(slice(b, b + extent) for b, extent in zip(before, shape))
    all_channels = (slice(None), *inside)
    return Reconstruction(image, visible[inside], restored[all_channels], float(np.mean(losses)))


def to_original_grid(model: PretrainedModel, prepared: PreparedImage, restored: np.ndarray) -> np.ndarray:
    """Brings a reconstruction to the grid and the intensities of the file it came from.

    The intensities follow from the line that fits the preprocessed image to the original one; what normalisation has
    clipped stays clipped. Outside the box that nnU-Net crops to, the original is kept.

    Args:
        model: whose plan.
        prepared: the image.
        restored: ``(C, D, H, W)``, preprocessed.

    Returns:
        float32 ``(C, ...)`` in the axes of the file.
    """
    plans, configuration, properties = model.plans, model.configuration, prepared.properties
    shape = properties["shape_after_cropping_and_before_resampling"]
    original_spacing = [properties["spacing"][axis] for axis in plans.transpose_forward]
    back = [
        np.asarray(configuration.resampling_fn_data(part, shape, configuration.spacing, original_spacing))
        for part in (restored, prepared.data)
    ]
    result = prepared.raw.astype(np.float32).transpose([0, *(axis + 1 for axis in plans.transpose_forward)])
    box = tuple(slice(low, high) for low, high in properties["bbox_used_for_cropping"])
    for channel, volume in enumerate(result):
        slope, offset = _line(back[1][channel], volume[box])
        volume[box] = back[0][channel] * slope + offset
    return result.transpose([0, *(axis + 1 for axis in plans.transpose_backward)])


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(y, [1, 99])
    inside = (y >= low) & (y <= high)
    if inside.sum() < FEWEST_FOR_FIT or float(np.std(x[inside])) == 0:
        return 1.0, float(np.mean(y) - np.mean(x))
    slope, offset = np.polyfit(x[inside].ravel(), y[inside].ravel(), 1)
    return float(slope), float(offset)


def write_nifti(path: str | os.PathLike[str], volume: np.ndarray, properties: dict[str, Any]) -> None:
    """Writes the first channel with the geometry of the image it came from.

    Args:
        path: ``.nii`` or ``.nii.gz``.
        volume: ``(C, ...)`` in the axes of the file that was read.
        properties: of nnU-Net's reader.
    """
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume[0], dtype=np.float32))
    geometry = properties.get("sitk_stuff")
    if geometry and len(geometry["spacing"]) == image.GetDimension():
        image.SetSpacing(geometry["spacing"])
        image.SetOrigin(geometry["origin"])
        image.SetDirection(geometry["direction"])
    else:
        image.SetSpacing([float(s) for s in list(properties["spacing"])[::-1]])
    sitk.WriteImage(image, str(path))
