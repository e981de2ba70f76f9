"""The dense path: fine-tuning steps and sliding-window prediction of our network beside nnU-Net's residual U-Net."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from types import SimpleNamespace
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import nn

from ..geometry import Size3
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


def finetuning_run(request: Request, network: Any) -> Callable[[], object]:
    """Forward and backward pass of a network on dense patches."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(request.batch, request.channels, *request.size, generator=generator).to(request.device)
    network = network.to(request.device).train()

    def run() -> object:
        with autocast(request):
            outputs = network(image)
        if torch.is_grad_enabled():
            network.zero_grad(set_to_none=True)
            segmentation_loss(outputs).backward()
        return outputs

    return run


def predicted_size(request: Request) -> Size3:
    """Voxels of the image that is predicted: one and a half patches along the first axis, so that nnU-Net lays two
    patches, half over each other."""
    depth, height, width = request.size
    return depth + depth // 2, height, width


def prediction_run(request: Request, network: Any) -> Callable[[], object]:
    """nnU-Net's sliding-window prediction of one image, without mirroring. On CUDA it takes half precision, whatever
    the request's."""
    with redirect_stdout(StringIO()):  # where it says that nothing but CUDA can hold the results
        predictor = nnUNetPredictor(use_mirroring=False, device=torch.device(request.device), allow_tqdm=False)
    network.decoder.deep_supervision = False
    predictor.network = network.to(request.device)
    predictor.configuration_manager = SimpleNamespace(patch_size=request.size)
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=CLASSES)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(request.channels, *predicted_size(request), generator=generator)
    return lambda: predictor.predict_sliding_window_return_logits(image)


def make_segmentation(request: Request, name: str, training: bool) -> Callable[[], object]:
    """:func:`finetuning_run` or :func:`prediction_run` of a network of :func:`networks`."""
    make = finetuning_run if training else prediction_run
    return make(request, networks(request)[name])
