"""Convolution and pooling that run on dense maps or, given a layout, on sparse ones."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ..depthwise import depthwise_conv3d, has_fast_gradients
from ..geometry import Size3, as_size3
from ..linear import linear, runs_on_onednn
from ..sparse import SparseLayout


class Conv3d(nn.Conv3d):
    """Same-padded 3D convolution with odd kernel.

    Without a layout it is ``torch.nn.Conv3d`` on ``(B, C, D, H, W)``; with one it is the submanifold convolution of
    that layout, with the same parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size3,
        stride: Size3 = (1, 1, 1),
        groups: int = 1,
        bias: bool = True,
    ):
        if any(k % 2 == 0 for k in kernel_size):
            raise ValueError(f"kernel size is {kernel_size}; same padding needs odd sizes on every axis.")
        padding = (kernel_size[0] // 2, kernel_size[1] // 2, kernel_size[2] // 2)
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias)
        self.same_padding = padding

    def forward(self, x: torch.Tensor, layout: SparseLayout | None = None) -> torch.Tensor:
        """``(B, C, D, H, W)``, or the layout's own form."""
        if layout is not None:
            return layout.conv3d(x, self.weight, self.bias, as_size3(self.stride), self.groups)
        if self.stride == (1, 1, 1) and has_fast_gradients(x, self.weight, self.groups):
            return depthwise_conv3d(x, self.weight, self.bias, self.same_padding)
        if (
            self.kernel_size == self.stride == (1, 1, 1)
            and self.groups == 1
            and runs_on_onednn(x)
            and x.is_contiguous(memory_format=torch.channels_last_3d)
        ):
            # with one thread PyTorch would take another library, and leave channels-last memory
            return linear(x.permute(0, 2, 3, 4, 1), self.weight.flatten(1), self.bias).permute(0, 4, 1, 2, 3)
        return super().forward(x)


def max_pool3d(x: torch.Tensor, stride: Size3, layout: SparseLayout | None = None) -> torch.Tensor:
    """Max-pooling with window = stride; a stride of one is the identity."""
    if stride == (1, 1, 1):
        return x
    if layout is None:
        return F.max_pool3d(x, stride, stride)
    return layout.max_pool3d(x, stride)
