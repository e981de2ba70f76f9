"""From sparse multi-scale features to a reconstructed image (HySparK, section 2.2, equations 3 and 4), by the
paper's decoder or by the segmentation network's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import nn

from ..geometry import Size3, as_size3
from ..sparse import SparseLayout
from .convolution import Conv3d
from .normalization import BatchNorm3d, InstanceNorm3d
from .phase_convolution import phases_pay, upsample_conv3d


def decoder_norm(name: str, channels: int) -> nn.Module:
    """``"instance"`` (per sample, so that a batch equals its samples one by one) or ``"batch"`` (official release)."""
    if name == "instance":
        return InstanceNorm3d(channels)
    if name == "batch":
        return BatchNorm3d(channels)
    raise ValueError(f"decoder_norm is {name!r}; expected 'instance' or 'batch'.")


class DoubleConv(nn.Sequential):
    """Twice convolution, norm, ReLU: ``in_channels -> out_channels -> out_channels``.

    A norm removes the bias before it, so there is none; only with batch norm, for the official release's weights.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Size3, norm: str):
        bias = norm == "batch"
        super().__init__(
            Conv3d(in_channels, out_channels, kernel_size, bias=bias),
            decoder_norm(norm, out_channels),
            nn.ReLU(inplace=True),
            Conv3d(out_channels, out_channels, kernel_size, bias=bias),
            decoder_norm(norm, out_channels),
            nn.ReLU(inplace=True),
        )

    @property
    def first(self) -> nn.Conv3d:
        """The first convolution."""
        layer = self[0]
        if not isinstance(layer, nn.Conv3d):
            raise TypeError(f"the first layer is a {type(layer).__name__}; expected a convolution.")
        return layer

    def after_first(self, x: torch.Tensor) -> torch.Tensor:
        """Everything behind the first convolution, given that convolution's result."""
        for layer in list(self)[1:]:
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """Transposed convolution with kernel = stride, then two convolutions to the next width.

    Where it costs less, the transposed and the first convolution are computed as one, phase by phase.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: Size3, kernel_size: Size3, norm: str):
        super().__init__()
        self.stride, self.kernel_size = stride, kernel_size
        self.upsample = nn.ConvTranspose3d(in_channels, in_channels, stride, stride)
        self.convs = DoubleConv(in_channels, out_channels, kernel_size, norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, in, D, H, W)`` to ``(B, out, D * stride, ...)``."""
        if not phases_pay(x.numel() // x.shape[1], self.stride, self.kernel_size, x.shape[1]):
            return self.convs(self.upsample(x))
        return self.convs.after_first(self._merged(x))

    def _merged(self, x: torch.Tensor) -> torch.Tensor:
        up = self.upsample
        up_bias = x.new_zeros(up.out_channels) if up.bias is None else up.bias
        first = self.convs.first
        return upsample_conv3d(x, up.weight, up_bias, first.weight, first.bias, self.stride)


SKIPS = ("concatenate", "add", "none")


def mask_tokens(channels: Iterable[int]) -> nn.ParameterList:
    """A fresh token ``(C,)`` per width: what hidden voxels of that scale hold."""
    tokens = nn.ParameterList(nn.Parameter(torch.empty(c)) for c in channels)
    for token in tokens:
        nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02)
    return tokens


class ReconstructionDecoder(nn.Module):
    """Fills masked cells with mask tokens, projects every scale, and decodes with skip connections.

    Args:
        output_channels: image channels.
        feature_channels: encoder widths, finest first.
        strides: per-stage strides of the encoder, finest first.
        kernel_sizes: per-stage kernel sizes of the decoder's convolutions, odd; the junction's projection is 1x1x1.
        width: decoder width at the junction, halved at every finer scale.
        fuse_finest: whether the finest scale's features are fused too, as equation 4 says; the official release
            leaves that fusion out.
        norm: see :func:`decoder_norm`.
        skips: how the encoder's scales join the decoder: ``"concatenate"`` and fuse by convolutions (equation 4),
            ``"add"`` as SparK does, or ``"none"`` but the junction's (the paper's table 5).

    Raises:
        ValueError: if the width cannot be halved often enough, or ``skips`` is unknown.
    """

    def __init__(
        self,
        output_channels: int,
        feature_channels: Sequence[int],
        strides: Sequence[Sequence[int]],
        kernel_sizes: Sequence[Sequence[int]],
        width: int,
        fuse_finest: bool = True,
        norm: str = "instance",
        skips: str = "concatenate",
    ):
        super().__init__()
        n_scales = len(feature_channels)
        if skips not in SKIPS:
            raise ValueError(f"skips is {skips!r}; expected one of {', '.join(SKIPS)}.")
        if width % 2 ** (n_scales - 1):
            raise ValueError(
                f"decoder_width is {width}; with {n_scales} scales it must be a multiple of {2 ** (n_scales - 1)}."
            )
        coarse_to_fine = list(range(n_scales - 1, -1, -1))
        widths = [width // 2**step for step in range(n_scales)]
        kernels = [as_size3(kernel_sizes[scale], "kernel size") for scale in coarse_to_fine]
        channels = [feature_channels[scale] for scale in coarse_to_fine]
        self.n_fused = 1 if skips == "none" else n_scales if fuse_finest else n_scales - 1
        self.mask_tokens = mask_tokens(channels[: self.n_fused])
        self.projections = nn.ModuleList(
            Conv3d(c, w, (1, 1, 1) if step == 0 else kernel)
            for step, (c, w, kernel) in enumerate(zip(channels[: self.n_fused], widths, kernels))
        )
        self.up = nn.ModuleList(
            UpBlock(wide, narrow, as_size3(strides[scale], "stride"), kernel, norm)
            for wide, narrow, scale, kernel in zip(widths, widths[1:], coarse_to_fine, kernels[1:])
        )
        fused_widths = widths[1 : self.n_fused] if skips == "concatenate" else []
        self.fuse = nn.ModuleList(
            DoubleConv(2 * w, w, kernel, norm) for w, kernel in zip(fused_widths, kernels[1:])
        )
        self.head = Conv3d(widths[-1], output_channels, (1, 1, 1))

    def forward(self, features: Sequence[torch.Tensor], layout: SparseLayout) -> torch.Tensor:
        """Reconstructs the image.

        Args:
            features: sparse features finest first, in the layout's form.
            layout: where they lie.

        Returns:
            ``(B, output_channels, D, H, W)``.
        """
        projected = [
            layout.densified_conv3d(feature, token, projection.weight, projection.bias)
            for feature, token, projection in zip(
                reversed(features), self.mask_tokens, cast("Iterable[nn.Conv3d]", self.projections)
            )
        ]
        x = projected[0]
        for step, up in enumerate(self.up):
            x = up(x)
            if step < len(self.fuse):
                x = self.fuse[step](torch.cat([x, projected[step + 1]], dim=1))
            elif step + 1 < self.n_fused:
                x = x + projected[step + 1]
        return self.head(x)


class TransferableDecoder(nn.Module):
    """Fills masked cells with mask tokens and decodes with the segmentation network's own decoder, so that fine-tuning
    can take over that decoder too. Not in the paper.

    Args:
        output_channels: image channels.
        feature_channels: encoder widths, finest first.
        decoder: turns dense features, finest first, into a map ``(B, width, D, H, W)``.
        width: of that map.
    """

    def __init__(self, output_channels: int, feature_channels: Sequence[int], decoder: nn.Module, width: int):
        super().__init__()
        self.mask_tokens = mask_tokens(feature_channels)
        self.decoder = decoder
        self.head = Conv3d(width, output_channels, (1, 1, 1))

    def forward(self, features: Sequence[torch.Tensor], layout: SparseLayout) -> torch.Tensor:
        """As :meth:`ReconstructionDecoder.forward`."""
        return self.head(self.decoder([layout.scatter(x, token) for x, token in zip(features, self.mask_tokens)]))
