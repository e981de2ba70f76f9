"""The network as the official release computes it: dense, masked after every step, contiguous memory."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from ..networks.mednext import MedNeXtBlock
from ..networks.reconstruction import ReconstructionDecoder, UpBlock
from ..pretext.hyspark import HySparK
from ..sparse import DenseMaskLayout, SparseLayout


class ContiguousMaskLayout(DenseMaskLayout):
    """Dense-then-mask in contiguous memory."""

    def conv3d(self, x, weight, bias, stride, groups):
        """As the parent, in contiguous memory."""
        return super().conv3d(x.contiguous(), weight.contiguous(), bias, stride, groups)


class _ContiguousBlock(MedNeXtBlock):
    def forward(self, x: torch.Tensor, layout: SparseLayout | None = None) -> torch.Tensor:
        y = self.depthwise(x, layout)
        y = self.norm(y.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3).contiguous()
        y = F.gelu(F.conv3d(y, self.expand.weight[:, :, None, None, None], self.expand.bias))
        return x + F.conv3d(y, self.compress.weight[:, :, None, None, None], self.compress.bias)


class _TwoStepUp(UpBlock):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convs(self.upsample(x))


class _ContiguousDecoder(ReconstructionDecoder):
    def forward(self, features, layout):
        return super().forward([feature.contiguous() for feature in features], layout)


def official_like(model: HySparK) -> HySparK:
    """A copy of a model with the same weights that computes densely, in contiguous memory, with PyTorch's own norms and
    without merged convolutions. Its result is the model's, to rounding."""
    reference = copy.deepcopy(model)
    reference.layout = ContiguousMaskLayout
    for parent in list(reference.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (nn.InstanceNorm3d, nn.BatchNorm3d)):
                stock: nn.Module = (
                    nn.InstanceNorm3d(child.num_features, child.eps, affine=True)
                    if isinstance(child, nn.InstanceNorm3d)
                    else nn.BatchNorm3d(child.num_features, child.eps)
                )
                stock.load_state_dict(child.state_dict())
                setattr(parent, name, stock)
    for module in reference.modules():
        if isinstance(module, MedNeXtBlock):
            module.__class__ = _ContiguousBlock
        elif isinstance(module, UpBlock):
            module.__class__ = _TwoStepUp
        elif isinstance(module, ReconstructionDecoder):
            module.__class__ = _ContiguousDecoder
    return reference


def dense_then_mask(model: HySparK) -> HySparK:
    """A copy of a model with the same weights that computes densely and multiplies by the mask, with everything else
    (memory format, norms, merged convolutions) as good as the model's own."""
    reference = copy.deepcopy(model)
    reference.layout = DenseMaskLayout
    return reference
