"""nnU-Net's own encoders as the CNN of the hybrid encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from torch import nn

from ..geometry import as_size3
from ..sparse import SparseLayout
from ..sparse.carried import SparseMap


class StockCNN(nn.Module):
    """Wraps a CNN that returns one feature map per stage; it may know nothing of masks.

    Args:
        encoder: called with a map, returns its features, finest first. Made of 3D convolutions, instance norms,
            poolings and activations; see :class:`nnunetv2_hyspark.sparse.carried.SparseMap`.
        input_channels: image channels.
        features_per_stage, strides, kernel_sizes: per stage, finest first; the first stride must be 1.

    Attributes:
        skip_channels, out_channels: see :class:`nnunetv2_hyspark.networks.encoder.StagedCNN`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        input_channels: int,
        features_per_stage: Sequence[int],
        strides: Sequence[Sequence[int]],
        kernel_sizes: Sequence[Sequence[int]],
    ):
        super().__init__()
        self.encoder = encoder
        self.input_channels = input_channels
        self.strides = [as_size3(s, "stride") for s in strides]
        if self.strides[0] != (1, 1, 1):
            raise ValueError(f"the first stage has stride {self.strides[0]}; expected (1, 1, 1).")
        self.kernel_sizes = [as_size3(k, "kernel size") for k in kernel_sizes]
        self.skip_channels = list(features_per_stage[:-1])
        self.out_channels = features_per_stage[-1]

    def forward(self, x: torch.Tensor, layout: SparseLayout | None = None) -> list[torch.Tensor]:
        """Features of every scale, finest first, in the form of the input."""
        if layout is None:
            return list(self.encoder(x))
        return [feature.values for feature in self.encoder(SparseMap(x, layout))]


def build_stock_cnn(
    kind: str,
    input_channels: int,
    features_per_stage: Sequence[int],
    strides: Sequence[Sequence[int]],
    kernel_sizes: Sequence[Sequence[int]],
    n_blocks_per_stage: Sequence[int],
) -> StockCNN:
    """nnU-Net's residual (``"residual"``) or plain (``"plain"``) encoder, with instance norm and leaky ReLU.

    Args:
        kind: which one.
        input_channels: image channels.
        features_per_stage, strides, kernel_sizes: per stage, finest first.
        n_blocks_per_stage: residual blocks, or plain convolutions, per stage.

    Raises:
        ValueError: for another kind.
    """
    common: dict[str, Any] = {
        "input_channels": input_channels,
        "n_stages": len(features_per_stage),
        "features_per_stage": list(features_per_stage),
        "conv_op": nn.Conv3d,
        "kernel_sizes": [list(k) for k in kernel_sizes],
        "strides": [list(s) for s in strides],
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        "return_skips": True,
    }
    if kind == "residual":
        encoder = ResidualEncoder(n_blocks_per_stage=list(n_blocks_per_stage), **common)
    elif kind == "plain":
        encoder = PlainConvEncoder(n_conv_per_stage=list(n_blocks_per_stage), **common)
    else:
        raise ValueError(f"cnn is {kind!r}; expected 'mednext', 'residual' or 'plain'.")
    return StockCNN(encoder, input_channels, features_per_stage, strides, kernel_sizes)
