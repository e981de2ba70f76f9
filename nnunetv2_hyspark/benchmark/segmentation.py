"""The dense path: fine-tuning steps and sliding-window forwards of our network beside nnU-Net's residual U-Net."""

from __future__ import annotations

import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import nn

from ..networks.segmentation import HySparKUNet
from ..networks.topology import PAPER_STRIDES, ArchitectureConfig, derive_arch_kwargs

CLASSES = 4
RESENC_BLOCKS = (1, 3, 4, 6, 6, 6)
RESENC_WIDTHS = (32, 64, 128, 256, 320, 320)


def hyspark_unet(base_width: int) -> nn.Module:
    """Our segmentation network with the paper's encoder (``base_width=32``), deep supervision on."""
    config = ArchitectureConfig(base_width=base_width)
    kwargs = derive_arch_kwargs(PAPER_STRIDES, [(3, 3, 3)] * len(PAPER_STRIDES), config)
    return HySparKUNet(1, CLASSES, **kwargs, deep_supervision=True)


def residual_unet(base_width: int) -> nn.Module:
    """nnU-Net's residual-encoder U-Net with the stages of its ResEnc-L plan, which has ``base_width=32``."""
    widths = [base_width * width // RESENC_WIDTHS[0] for width in RESENC_WIDTHS]
    n_stages = len(widths)
    return ResidualEncoderUNet(
        1, n_stages, widths, nn.Conv3d, 3, [1, *[2] * (n_stages - 1)], list(RESENC_BLOCKS), CLASSES,
        [1] * (n_stages - 1), conv_bias=True, norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, deep_supervision=True,
    )


def networks(base_width: int) -> dict[str, nn.Module]:
    """What is compared, by name: ours, ResEnc-L, and ResEnc so narrow that it has about as many parameters as ours."""
    torch.manual_seed(0)
    return {
        "HySparKUNet": hyspark_unet(base_width),
        "ResEnc-L": residual_unet(base_width),
        "ResEnc, narrow": residual_unet(3 * base_width // 8),
    }


def parameters(network: nn.Module) -> float:
    """Millions of parameters."""
    return sum(p.numel() for p in network.parameters()) / 1e6


def segmentation_loss(outputs: list[torch.Tensor]) -> torch.Tensor:
    """A stand-in with a gradient at every output; the loss proper is nnU-Net's for both networks."""
    return torch.stack([output.float().square().mean() for output in outputs]).sum()
