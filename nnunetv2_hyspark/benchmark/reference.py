"""Dense references: dense-then-mask as fast as it can be, and the network as the official release computes it."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from ..depthwise import depthwise_conv3d, has_fast_gradients
from ..linear import Linear
from ..networks.mednext import MedNeXtBlock
from ..networks.reconstruction import ReconstructionDecoder, TransferableDecoder, UpBlock
from ..networks.segmentation import MedNeXtDecoder
from ..pretext.hyspark import HySparK
from ..sparse import DenseMaskLayout, SparseLayout


class FastMaskLayout(DenseMaskLayout):
    """Dense-then-mask with this library's gradients of depthwise convolutions, where these serve."""

    def conv3d(self, x, weight, bias, stride, groups):
        """As the parent."""
        if self.hidden != "zero" or stride != (1, 1, 1) or not has_fast_gradients(x, weight, groups):
            return super().conv3d(x, weight, bias, stride, groups)
        padding = (weight.shape[2] // 2, weight.shape[3] // 2, weight.shape[4] // 2)
        mask = self._mask_of(x)
        return depthwise_conv3d(x * mask, weight, bias, padding) * mask


class ChannelsLastMaskLayout(FastMaskLayout):
    """Dense-then-mask in channels-last memory on every device."""

    def conv3d(self, x, weight, bias, stride, groups):
        """As the parent, in channels-last memory."""
        return super().conv3d(x.contiguous(memory_format=torch.channels_last_3d), weight, bias, stride, groups)


class ContiguousMaskLayout(DenseMaskLayout):
    """Dense-then-mask in contiguous memory."""

    def conv3d(self, x, weight, bias, stride, groups):
        """As the parent, in contiguous memory."""
        return super().conv3d(x.contiguous(), weight.contiguous(), bias, stride, groups)


class _ContiguousBlock(MedNeXtBlock):
    def forward(self, x: torch.Tensor, layout: SparseLayout | None = None) -> torch.Tensor:
        own = self.depthwise
        if layout is None:
            y = F.conv3d(x, own.weight, own.bias, padding=own.same_padding, groups=own.groups)
        else:
            y = own(x, layout)
        y = self.norm(y.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3).contiguous()
        y = F.gelu(F.conv3d(y, self.expand.weight[:, :, None, None, None], self.expand.bias))
        return x + F.conv3d(y, self.compress.weight[:, :, None, None, None], self.compress.bias)


class _TwoStepJoin(MedNeXtDecoder):
    def join(self, step: int, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return self.fuse[step](torch.cat([self.up[step](x), skip], dim=1))


class _ContiguousTransferableDecoder(TransferableDecoder):
    def forward(self, features, layout):
        return super().forward([feature.contiguous() for feature in features], layout)


class _StockLinear(Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class _TwoStepUp(UpBlock):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convs(self.upsample(x))


class _ContiguousDecoder(ReconstructionDecoder):
    def forward(self, features, layout):
        return super().forward([feature.contiguous() for feature in features], layout)


def _stock_norm(norm: nn.InstanceNorm3d | nn.BatchNorm3d) -> nn.Module:
    made: nn.Module = (
        nn.InstanceNorm3d(norm.num_features, norm.eps, affine=True)
        if isinstance(norm, nn.InstanceNorm3d)
        else nn.BatchNorm3d(norm.num_features, norm.eps)
    )
    made.load_state_dict(norm.state_dict())
    return made


def official_like(model: HySparK) -> HySparK:
    """A copy of a model with the same weights that computes densely, in contiguous memory, with PyTorch's own norms and
    without merged convolutions. Its result is the model's, to rounding."""
    reference = copy.deepcopy(model)
    reference.layout = ContiguousMaskLayout
    stock: dict[nn.Module, nn.Module] = {}
    for path, module in list(reference.named_modules(remove_duplicate=False)):
        if isinstance(module, (nn.InstanceNorm3d, nn.BatchNorm3d)):
            parent, _, name = path.rpartition(".")
            setattr(reference.get_submodule(parent), name, stock.setdefault(module, _stock_norm(module)))
    for module in reference.modules():
        if isinstance(module, MedNeXtBlock):
            module.__class__ = _ContiguousBlock
        elif isinstance(module, UpBlock):
            module.__class__ = _TwoStepUp
        elif isinstance(module, ReconstructionDecoder):
            module.__class__ = _ContiguousDecoder
        elif isinstance(module, TransferableDecoder):
            module.__class__ = _ContiguousTransferableDecoder
        elif isinstance(module, MedNeXtDecoder):
            module.__class__ = _TwoStepJoin
        elif isinstance(module, Linear):
            module.__class__ = _StockLinear
    return reference


def dense_then_mask(model: HySparK) -> HySparK:
    """A copy of a model with the same weights that computes densely and multiplies by the mask, with everything else
    (memory format, norms, merged convolutions, gradients) as good as the model's own."""
    return _laid_out(model, FastMaskLayout)


def dense_channels_last(model: HySparK) -> HySparK:
    """As :func:`dense_then_mask`, in channels-last memory also where PyTorch's depthwise kernels want another."""
    return _laid_out(model, ChannelsLastMaskLayout)


def _laid_out(model: HySparK, layout: type[DenseMaskLayout]) -> HySparK:
    reference = copy.deepcopy(model)
    reference.layout = layout
    return reference
