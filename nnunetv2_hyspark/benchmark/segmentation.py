"""The dense path: fine-tuning steps and sliding-window forwards of our network beside nnU-Net's residual U-Net."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import nn

from ..networks.segmentation import HySparKUNet
from .request import Request, autocast

CLASSES = 4
RESENC_STAGES = 6
RESENC_STRIDES = (1, *[2] * (RESENC_STAGES - 1))


def hyspark_unet(channels: int, arch_kwargs: Mapping[str, Any]) -> nn.Module:
    """Our segmentation network, deep supervision on."""
    return HySparKUNet(channels, CLASSES, **arch_kwargs, deep_supervision=True)


def residual_unet(
    base_width: int, channels: int = 1, strides: Sequence[Any] = RESENC_STRIDES, kernel_sizes: Any = 3
) -> nn.Module:
    """nnU-Net's residual-encoder U-Net as its planner would make it on these strides; with the default ones and
    ``base_width=32`` its ResEnc-L plan."""
    n_stages = len(strides)
    widths = [min(base_width * 2**stage, 10 * base_width) for stage in range(n_stages)]
    blocks = [1, 3, 4, *[6] * n_stages][:n_stages]
    return ResidualEncoderUNet(
        channels, n_stages, widths, nn.Conv3d, kernel_sizes, strides, blocks, CLASSES, [1] * (n_stages - 1),
        conv_bias=True, norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, deep_supervision=True,
    )


def networks(request: Request) -> dict[str, nn.Module]:
    """What is compared, by name: ours and ResEnc-L, and ResEnc so narrow that it has about as many parameters as ours;
    for a plan ours and ResEnc on the plan's strides, as wide at the finest scale."""
    torch.manual_seed(0)
    ours = {"HySparKUNet": hyspark_unet(request.channels, request.arch_kwargs)}
    if request.planned:
        kwargs = request.arch_kwargs
        return {
            **ours,
            "ResEnc": residual_unet(
                kwargs["features_per_stage"][0], request.channels, kwargs["strides"], kwargs["kernel_sizes"]
            ),
        }
    return {
        **ours,
        "ResEnc-L": residual_unet(request.base_width),
        "ResEnc, narrow": residual_unet(3 * request.base_width // 8),
    }


def parameters(network: nn.Module) -> float:
    """Millions of parameters."""
    return sum(p.numel() for p in network.parameters()) / 1e6


def segmentation_loss(outputs: list[torch.Tensor]) -> torch.Tensor:
    """A stand-in with a gradient at every output; the loss proper is nnU-Net's for both networks."""
    return torch.stack([output.float().square().mean() for output in outputs]).sum()


def segmentation_run(request: Request, network: Any, training: bool) -> Callable[[], object]:
    """Forward and backward pass of a network on a dense patch, or its forward pass alone."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(request.batch, request.channels, *request.size, generator=generator).to(request.device)
    network = network.to(request.device).train(training)
    network.decoder.deep_supervision = training

    def run() -> object:
        if training and torch.is_grad_enabled():
            network.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(training and torch.is_grad_enabled()), autocast(request):
            outputs = network(image)
        if training and torch.is_grad_enabled():
            segmentation_loss(outputs).backward()
        return outputs

    return run


def make_segmentation(request: Request, name: str, training: bool) -> Callable[[], object]:
    """:func:`segmentation_run` of a network of :func:`networks`."""
    return segmentation_run(request, networks(request)[name], training)
