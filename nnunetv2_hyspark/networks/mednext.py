"""MedNeXt encoder stages as HySparK uses them (Roy et al., MICCAI 2023; Tang et al., MICCAI 2024, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ..geometry import Size3, as_size3
from ..inverted_bottleneck import inverted_bottleneck, passes_once
from ..linear import Linear
from ..sparse import SparseLayout
from .convolution import Conv3d, max_pool3d


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of every voxel of ``(N, C, D, H, W)``, eps 1e-6."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape as the input."""
        return super().forward(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class MedNeXtBlock(nn.Module):
    """Depthwise convolution, LayerNorm over channels, 1x1x1 expansion, GELU, 1x1x1 compression, residual.

    Args:
        channels: width C.
        kernel_size: of the depthwise convolution, odd.
        expansion: hidden width over C.
    """

    def __init__(self, channels: int, kernel_size: Size3, expansion: int):
        super().__init__()
        self.depthwise = Conv3d(channels, channels, kernel_size, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = Linear(channels, expansion * channels)
        self.compress = Linear(expansion * channels, channels)

    def forward(self, x: torch.Tensor, layout: SparseLayout | None = None) -> torch.Tensor:
        """``(B, C, D, H, W)``, or the layout's own form, to the same shape."""
        voxels = self.depthwise(x, layout).permute(0, 2, 3, 4, 1)
        if passes_once(voxels, self.expand.out_features):
            voxels = inverted_bottleneck(
                voxels, x.permute(0, 2, 3, 4, 1), self.norm.weight, self.norm.bias, self.norm.eps,
                self.expand.weight, self.expand.bias, self.compress.weight, self.compress.bias,
            )
            return voxels.permute(0, 4, 1, 2, 3)
        voxels = self.compress(F.gelu(self.expand(self.norm(voxels))))
        return x + voxels.permute(0, 4, 1, 2, 3)


class MedNeXtStage(nn.ModuleList):
    """MedNeXt blocks of one resolution, one after another."""

    def __init__(self, channels: int, kernel_size: Size3, n_blocks: int, expansion: int):
        super().__init__(MedNeXtBlock(channels, kernel_size, expansion) for _ in range(n_blocks))

    def forward(self, x: torch.Tensor, layout: SparseLayout | None = None) -> torch.Tensor:
        """``(B, C, D, H, W)``, or the layout's own form, to the same shape."""
        for block in self:
            x = block(x, layout)
        return x


class MedNeXtStages(nn.Module):
    """The CNN of HySparK: a stem, and per stage MedNeXt blocks followed by a convolution to the next width.

    The convolution's output is the skip feature of that resolution and, max-pooled, the input of the next stage. The
    last stage has blocks only; its output is the junction with the transformer.

    Args:
        input_channels: image channels.
        features_per_stage: widths, finest first.
        strides: per-stage strides; the first must be 1.
        kernel_sizes: per-stage kernel sizes, odd.
        n_blocks_per_stage: MedNeXt blocks per stage.
        expansion_per_stage: expansion of these blocks.

    Attributes:
        skip_channels: widths of the skip features, finest first.
        out_channels: width of the junction.
    """

    def __init__(
        self,
        input_channels: int,
        features_per_stage: Sequence[int],
        strides: Sequence[Sequence[int]],
        kernel_sizes: Sequence[Sequence[int]],
        n_blocks_per_stage: Sequence[int],
        expansion_per_stage: Sequence[int],
    ):
        super().__init__()
        n_stages = len(features_per_stage)
        for name, values in (
            ("strides", strides),
            ("kernel_sizes", kernel_sizes),
            ("n_blocks_per_stage", n_blocks_per_stage),
            ("expansion_per_stage", expansion_per_stage),
        ):
            if len(values) != n_stages:
                raise ValueError(f"{name} has {len(values)} entries for {n_stages} stages; give one per stage.")
        if n_stages < 2:
            raise ValueError(f"the encoder has {n_stages} stage; it needs at least two to have a junction and a skip.")
        self.strides = [as_size3(s, "stride") for s in strides]
        if self.strides[0] != (1, 1, 1):
            raise ValueError(f"the first stage has stride {self.strides[0]}; expected (1, 1, 1).")
        self.kernel_sizes = kernels = [as_size3(k, "kernel size") for k in kernel_sizes]
        widths = list(features_per_stage)
        self.stem = Conv3d(input_channels, widths[0], kernels[0])
        self.stages = nn.ModuleList(
            MedNeXtStage(width, kernel, blocks, expansion)
            for width, kernel, blocks, expansion in zip(widths, kernels, n_blocks_per_stage, expansion_per_stage)
        )
        self.widen = nn.ModuleList(
            Conv3d(narrow, wide, kernel) for narrow, wide, kernel in zip(widths, widths[1:], kernels)
        )
        self.input_channels = input_channels
        self.skip_channels = widths[1:]
        self.out_channels = widths[-1]

    def forward(self, x: torch.Tensor, layout: SparseLayout | None = None) -> list[torch.Tensor]:
        """Features of every scale, finest first; the last is the junction."""
        x = self.stem(x, layout)
        if layout is None and x.device.type == "cpu":
            # LayerNorm and 1x1x1 layers then need no copies, and depthwise convolutions run several times faster
            x = x.contiguous(memory_format=torch.channels_last_3d)
        features = []
        for stage, widen, stride in zip(self.stages, self.widen, self.strides[1:]):
            skip = widen(stage(x, layout), layout)
            features.append(skip)
            x = max_pool3d(skip, stride, layout)
        return [*features, self.stages[-1](x, layout)]
