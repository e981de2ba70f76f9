"""The hybrid encoder: any CNN of stages on top, a transformer on its last feature map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from ..geometry import Size3, as_size3, cumulative_strides, divide
from ..sparse import SparseLayout
from .vit import ViT


class StagedCNN(Protocol):
    """What the hybrid encoder needs of a CNN."""

    input_channels: int
    strides: list[Size3]
    kernel_sizes: list[Size3]
    skip_channels: list[int]
    out_channels: int

    def __call__(self, x: torch.Tensor, layout: SparseLayout | None = None) -> list[torch.Tensor]:
        """Features of every scale, finest first."""


class HybridEncoder(nn.Module):
    """CNN stages and a transformer, for dense images and for the visible blocks of masked ones.

    There is one set of weights and one forward: without a layout the CNN runs padded convolutions on the whole image
    and the transformer sees every cell; with a layout both see visible cells only (HySparK, section 2.1).

    Args:
        cnn: stages from the image to the junction.
        transformer: runs on junction tokens; None makes the encoder a plain CNN (then pre-training is SparK).

    Attributes:
        input_channels: image channels.
        strides: per-stage strides, finest first.
        junction_stride: voxels per junction cell ``(D, H, W)``.
        feature_channels: widths of the returned features, finest first.
    """

    def __init__(self, cnn: StagedCNN, transformer: ViT | None):
        super().__init__()
        self.cnn = cnn
        self.transformer = transformer
        self.input_channels = cnn.input_channels
        self.strides: list[Size3] = list(cnn.strides)
        self.junction_stride: Size3 = cumulative_strides(cnn.strides)[-1]
        self.feature_channels: list[int] = [*cnn.skip_channels, cnn.out_channels]

    def grid(self, image_size: Sequence[int]) -> Size3:
        """Junction cells per axis of an image. Raises ValueError where the stride does not divide the size."""
        return divide(as_size3(image_size), self.junction_stride, "image of size")

    def forward(self, image: torch.Tensor, layout: SparseLayout | None = None) -> list[torch.Tensor]:
        """Encodes an image at every scale.

        Args:
            image: dense image ``(B, C, D, H, W)``; with a layout, its sparse form ``layout.gather(image)``.
            layout: where the visible cells are.

        Returns:
            Features finest first, dense ``(B, C_i, D_i, H_i, W_i)`` or in the layout's sparse form.
        """
        *skips, junction = self.cnn(image, layout)
        return [*skips, self.transform(junction, layout)]

    def transform(self, junction: torch.Tensor, layout: SparseLayout | None = None) -> torch.Tensor:
        """The transformer alone, on the CNN's last feature map; dense or in the layout's form, in and out."""
        if self.transformer is None:
            return junction
        if layout is None:
            batch_size, channels = junction.shape[:2]
            grid = as_size3(junction.shape[2:])
            cell = torch.arange(junction[0, 0].numel(), device=junction.device)[None]
            tokens = self.transformer(junction.flatten(2).transpose(1, 2), cell, grid)
            return tokens.transpose(1, 2).reshape(batch_size, channels, *grid)
        tokens, cell, padding = layout.to_tokens(junction)
        tokens = self.transformer(tokens, cell, as_size3(layout.visible.shape[1:]), padding)
        return layout.from_tokens(tokens)
