"""One step of pre-training and one of fine-tuning, on shapes, as the trainers do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..geometry import as_size3, cumulative_strides, divide
from ..masking import random_visible
from ..networks.segmentation import HySparKUNet
from ..pretext.build import build_hyspark
from ..pretext.hyspark import HySparK, HySparKConfig, reconstruction_loss
from .trace import StepMemory, precision, trace_step


def trace_pretraining(
    input_channels: int,
    arch_kwargs: Mapping[str, Any],
    config: HySparKConfig,
    patch_size: Sequence[int],
    crops: int,
    mixed: bool = True,
) -> StepMemory:
    """Memory of a pre-training step: sparse encoder, dense decoder, loss.

    Args:
        input_channels: of the images.
        arch_kwargs: of :class:`nnunetv2_hyspark.networks.segmentation.HySparKUNet`.
        config: mask ratio, and which decoder, with its settings.
        patch_size: voxels, whole junction cells.
        crops: of a batch.
        mixed: precision as the trainers use it on CUDA, not float32.
    """
    size = as_size3(patch_size)
    grid = divide(size, cumulative_strides(arch_kwargs["strides"])[-1], "patch of size")
    visible = random_visible(crops, grid, config.lowest_mask_ratio, torch.Generator().manual_seed(0))

    def build() -> HySparK:
        return build_hyspark(input_channels, arch_kwargs, config)

    def step(network: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
        with precision(mixed):
            reconstruction = network(image, visible)
        return reconstruction_loss(image, reconstruction, visible, config.target)

    return trace_step(build, (crops, input_channels, *size), step)


def trace_finetuning(
    input_channels: int,
    num_classes: int,
    arch_kwargs: Mapping[str, Any],
    patch_size: Sequence[int],
    crops: int,
    mixed: bool = True,
) -> StepMemory:
    """Memory of a supervised step: dense network, deep supervision, nnU-Net's Dice and cross-entropy loss.

    Args:
        input_channels: of the images.
        num_classes: segmentation heads.
        arch_kwargs: as for :func:`trace_pretraining`.
        patch_size: voxels, whole junction cells.
        crops: patches of a batch.
        mixed: as for :func:`trace_pretraining`.
    """
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    size = as_size3(patch_size)
    options = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}

    def build() -> HySparKUNet:
        return HySparKUNet(input_channels, num_classes, **{**arch_kwargs, "deep_supervision": True})

    def step(network: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
        loss = DC_and_CE_loss(options, {}, dice_class=MemoryEfficientSoftDiceLoss)
        with precision(mixed):
            outputs = network(image)
            targets = [torch.empty_like(output[:, :1], dtype=torch.int16) for output in outputs]
            losses = [loss(output, target) for output, target in zip(outputs, targets)]
        return torch.stack(losses).sum()

    return trace_step(build, (crops, input_channels, *size), step)
