"""The segmentation network: the hybrid encoder on dense images and a MedNeXt decoder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn

from ..geometry import Size3, as_size3
from .convolution import Conv3d
from .encoder import HybridEncoder, StagedCNN
from .fusion import upsample_and_fuse
from .mednext import ChannelLayerNorm, MedNeXtStage, MedNeXtStages
from .stock_cnn import build_stock_cnn
from .vit import ViT


class MedNeXtDecoder(nn.Module):
    """Up-sampling decoder with skip connections, MedNeXt blocks and, optionally, deep supervision.

    Skip features are normalised first: pre-training leaves their scale free, and a fresh decoder starts best from
    features of unit scale.

    Args:
        encoder: gives widths, strides and the order of features.
        num_classes: output channels of every segmentation layer; 0: none, and the features before them are returned.
        widths: decoder width per skip scale, finest first.
        kernel_sizes: per-scale kernel sizes, finest first.
        n_blocks: MedNeXt blocks per scale.
        expansion: expansion of these blocks.
        deep_supervision: return one output per scale, finest first, instead of the finest alone.
    """

    def __init__(
        self,
        encoder: HybridEncoder,
        num_classes: int,
        widths: Sequence[int],
        kernel_sizes: Sequence[Sequence[int]],
        n_blocks: Sequence[int],
        expansion: int,
        deep_supervision: bool,
    ):
        super().__init__()
        self.deep_supervision = deep_supervision
        below = encoder.feature_channels[-1]
        self.skip_norms, self.up, self.fuse = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.stages, self.seg_layers = nn.ModuleList(), nn.ModuleList()
        for scale in range(len(widths) - 1, -1, -1):
            width, kernel = widths[scale], as_size3(kernel_sizes[scale], "kernel size")
            stride = encoder.strides[scale + 1]
            self.skip_norms.append(ChannelLayerNorm(encoder.feature_channels[scale]))
            self.up.append(nn.ConvTranspose3d(below, width, stride, stride))
            self.fuse.append(nn.Conv3d(width + encoder.feature_channels[scale], width, 1))
            self.stages.append(MedNeXtStage(width, kernel, n_blocks[scale], expansion))
            self.seg_layers.append(Conv3d(width, num_classes, (1, 1, 1)) if num_classes else nn.Identity())
            below = width

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """Segments.

        Args:
            features: dense encoder features, finest first.

        Returns:
            Logits ``(B, num_classes, D, H, W)`` (features ``(B, widths[0], D, H, W)`` without classes), or with deep
            supervision a list of them, finest first, one per skip scale.
        """
        x = features[-1]
        outputs = []
        skips = list(reversed(features[:-1]))
        for step, skip in enumerate(skips):
            x = self.stages[step](self.join(step, x, self.skip_norms[step](skip)))
            if self.deep_supervision or step == len(skips) - 1:
                outputs.append(self.seg_layers[step](x))
        return outputs[::-1] if self.deep_supervision else outputs[-1]

    def join(self, step: int, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """Coarse features and the skip of a step, coarsest first, to features of that scale."""
        return upsample_and_fuse(
            x, skip, cast(nn.ConvTranspose3d, self.up[step]), cast(nn.Conv3d, self.fuse[step])
        )


def build_encoder(
    input_channels: int,
    features_per_stage: Sequence[int],
    strides: Sequence[Sequence[int]],
    kernel_sizes: Sequence[Sequence[int]],
    n_blocks_per_stage: Sequence[int],
    expansion_per_stage: Sequence[int],
    transformer_depth: int,
    transformer_heads: int,
    mlp_ratio: float,
    cnn: str = "mednext",
) -> HybridEncoder:
    """The hybrid encoder from the numbers a plan holds: the paper's MedNeXt, or one of nnU-Net's encoders
    (``"residual"``, ``"plain"``), and a ViT; depth 0 leaves the ViT out."""
    stages: StagedCNN
    if cnn == "mednext":
        stages = MedNeXtStages(
            input_channels, features_per_stage, strides, kernel_sizes, n_blocks_per_stage, expansion_per_stage
        )
    else:
        stages = build_stock_cnn(cnn, input_channels, features_per_stage, strides, kernel_sizes, n_blocks_per_stage)
    width = features_per_stage[-1]
    transformer = ViT(width, transformer_depth, transformer_heads, mlp_ratio) if transformer_depth else None
    return HybridEncoder(stages, transformer)


class HySparKUNet(nn.Module):
    """Hybrid encoder and MedNeXt decoder, built from an nnU-Net plan's ``arch_kwargs``.

    Follows nnU-Net's contract, so the stock ``nnUNetTrainer`` and ``nnUNetv2_predict`` can use it: the class is named
    in the plans, ``decoder.deep_supervision`` switches the outputs, :meth:`compute_conv_feature_map_size` feeds the
    planner.

    Args:
        input_channels: image channels.
        num_classes: segmentation heads.
        n_stages: stages of the encoder, the junction included.
        features_per_stage, strides, kernel_sizes, n_blocks_per_stage, expansion_per_stage: per stage, finest first.
        transformer_depth, transformer_heads, mlp_ratio: of the transformer; depth 0 leaves it out.
        n_blocks_per_stage_decoder: per decoder scale, finest first (``n_stages - 1`` values).
        expansion_decoder: expansion of the decoder's blocks.
        cnn: see :func:`build_encoder`.
        deep_supervision: see :class:`MedNeXtDecoder`.

    Attributes:
        hyspark_load_pretrained: who loads ``-pretrained_weights`` in place of nnU-Net, given the file's name; a trainer
            of ours sets it, the start-up hook calls it.
    """

    hyspark_load_pretrained: Callable[[str], None] | None = None

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        n_stages: int,
        features_per_stage: Sequence[int],
        strides: Sequence[Sequence[int]],
        kernel_sizes: Sequence[Sequence[int]],
        n_blocks_per_stage: Sequence[int],
        expansion_per_stage: Sequence[int],
        transformer_depth: int,
        transformer_heads: int,
        n_blocks_per_stage_decoder: Sequence[int],
        mlp_ratio: float = 4.0,
        expansion_decoder: int = 4,
        cnn: str = "mednext",
        deep_supervision: bool = False,
    ):
        super().__init__()
        if len(features_per_stage) != n_stages:
            raise ValueError(f"features_per_stage has {len(features_per_stage)} entries for n_stages = {n_stages}.")
        if len(n_blocks_per_stage_decoder) != n_stages - 1:
            raise ValueError(
                f"n_blocks_per_stage_decoder has {len(n_blocks_per_stage_decoder)} entries; "
                f"expected n_stages - 1 = {n_stages - 1}."
            )
        self.encoder = build_encoder(
            input_channels, features_per_stage, strides, kernel_sizes, n_blocks_per_stage, expansion_per_stage,
            transformer_depth, transformer_heads, mlp_ratio, cnn,
        )
        self.decoder = MedNeXtDecoder(
            self.encoder, num_classes, features_per_stage[:-1], kernel_sizes[:-1], n_blocks_per_stage_decoder,
            expansion_decoder, deep_supervision,
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """``(B, input_channels, D, H, W)`` to logits; see :class:`MedNeXtDecoder`."""
        return self.decoder(self.encoder(image))

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Feature map elements (channels times voxels, convolutions and linear layers) of one forward pass.

        nnU-Net's planner compares this number with its reference to fit a network to a GPU.
        """
        return conv_feature_map_size(self, as_size3(input_size))


def conv_feature_map_size(network: HySparKUNet, input_size: Size3) -> int:
    """See :meth:`HySparKUNet.compute_conv_feature_map_size`; runs on shapes alone, without memory or arithmetic."""
    shapes_only = copy.deepcopy(network).to("meta")
    elements = 0

    def count(_module: nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
        nonlocal elements
        elements += output.numel()

    for module in shapes_only.modules():
        if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d, nn.Linear)):
            module.register_forward_hook(count)
    channels = shapes_only.encoder.input_channels
    dtype = next(shapes_only.parameters()).dtype
    with torch.no_grad():
        shapes_only(torch.empty(1, channels, *input_size, device="meta", dtype=dtype))
    return elements
