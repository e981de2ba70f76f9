"""A pre-training network for a plan's segmentation network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..networks.reconstruction import ReconstructionDecoder, TransferableDecoder
from ..networks.segmentation import MedNeXtDecoder, build_encoder
from ..sparse import BlockLayout, SparseLayout
from .hyspark import HySparK, HySparKConfig


def default_decoder_width(features_per_stage: Sequence[int]) -> int:
    """Junction width of the reconstruction decoder that makes its finest scale half of the first CNN stage.

    That is 256 for the paper's encoder; it keeps the full-resolution convolutions, the most
    expensive part of a step, in proportion for encoders with fewer or narrower stages.
    """
    finest = max(features_per_stage[0] // 2, 1)
    return finest * 2 ** (len(features_per_stage) - 1)


def with_decoder_width(config: HySparKConfig, arch_kwargs: Mapping[str, Any]) -> HySparKConfig:
    """The settings with the reconstruction decoder's width, where that reconstructs, as a number, so that a checkpoint
    tells it whatever the default becomes."""
    if config.decoder != "reconstruction":
        return config
    width = config.decoder_width or default_decoder_width(arch_kwargs["features_per_stage"])
    return replace(config, decoder_width=width)


def build_hyspark(
    input_channels: int,
    arch_kwargs: Mapping[str, Any],
    config: HySparKConfig,
    layout: Callable[[torch.Tensor, str], SparseLayout] = BlockLayout,
) -> HySparK:
    """The encoder of a segmentation network, with a decoder that reconstructs.

    Args:
        input_channels: image channels.
        arch_kwargs: of :class:`nnunetv2_hyspark.networks.segmentation.HySparKUNet`.
        config: kind, width, fusion, norm and skip connections of the decoder, and how the encoder is masked.
        layout: how masked input is computed.

    Raises:
        ValueError: if the decoder's width does not fit the number of scales.
    """
    encoder = build_encoder(
        input_channels,
        arch_kwargs["features_per_stage"],
        arch_kwargs["strides"],
        arch_kwargs["kernel_sizes"],
        arch_kwargs["n_blocks_per_stage"],
        arch_kwargs["expansion_per_stage"],
        arch_kwargs["transformer_depth"],
        arch_kwargs["transformer_heads"],
        arch_kwargs.get("mlp_ratio", 4.0),
        arch_kwargs.get("cnn", "mednext"),
    )
    decoder: ReconstructionDecoder | TransferableDecoder
    if config.decoder == "segmentation":
        widths = arch_kwargs["features_per_stage"][:-1]
        transferred = MedNeXtDecoder(
            encoder, 0, widths, arch_kwargs["kernel_sizes"][:-1], arch_kwargs["n_blocks_per_stage_decoder"],
            arch_kwargs.get("expansion_decoder", 4), deep_supervision=False,
        )
        decoder = TransferableDecoder(input_channels, encoder.feature_channels, transferred, widths[0])
    else:
        decoder = ReconstructionDecoder(
            input_channels,
            encoder.feature_channels,
            encoder.strides,
            arch_kwargs["kernel_sizes"],
            with_decoder_width(config, arch_kwargs).decoder_width,
            config.fuse_finest,
            config.decoder_norm,
            config.skips,
        )
    return HySparK(encoder, decoder, layout, config.hidden_neighbours, config.bottom_up, config.target)
