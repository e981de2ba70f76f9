"""What to measure, and the runs that are timed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..geometry import Size3, cumulative_strides, divide
from ..masking import count_visible
from ..networks.topology import PAPER_STRIDES, ArchitectureConfig, derive_arch_kwargs
from ..pretext.build import build_hyspark
from ..pretext.hyspark import HySparK, HySparKConfig, reconstruction_loss
from ..sparse.backends import Convolution, choose_backend
from ..training.parameters import decay_groups
from .plan import PlannedNetwork
from .reference import dense_channels_last, dense_then_mask, official_like

STEPS: dict[str, dict[str, Any]] = {
    "default": {},
    "reconstruction": {"decoder": "reconstruction"},
    "official": {
        "decoder": "reconstruction", "decoder_width": 768, "fuse_finest": False, "decoder_norm": "batch",
        "skips": "concatenate",
    },
    "segmentation": {"decoder": "segmentation"},
}
"""Settings of pre-training by which a step differs from the plan's, or without a plan from the defaults."""

VARIANTS: dict[str, Callable[[HySparK], HySparK]] = {
    "blocks": lambda model: model,
    "dense": dense_then_mask,
    "official-like": official_like,
}

GPU_REFERENCES: dict[str, Callable[[HySparK], HySparK]] = {"dense, channels-last": dense_channels_last}
"""References for GPUs alone: on CPUs ``dense`` is in channels-last memory anyway."""

OTHER_BACKENDS = {"cpu": ("torch",), "cuda": ("triton",)}
"""By kind of device, variants that are the block path by another backend than ``auto`` takes there."""

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Request:
    """What to measure: the paper's network, ``base_width`` wide, or that of a plan.

    Attributes:
        architecture, settings: of the paper's network and its pre-training; a plan has its own.
    """

    size: Size3 = (96, 96, 96)
    batch: int = 1
    mask_ratio: float = 0.75
    step: str = "default"
    base_width: int = 32
    device: str = "cpu"
    precision: str = "float32"
    compile: bool = False
    repeats: int = 5
    budget: float = 300.0
    planned: PlannedNetwork | None = None
    architecture: ArchitectureConfig = ArchitectureConfig()
    settings: HySparKConfig = HySparKConfig()

    @property
    def channels(self) -> int:
        """Of the images."""
        return self.planned.channels if self.planned else 1

    @property
    def arch_kwargs(self) -> dict[str, Any]:
        """Of :class:`nnunetv2_hyspark.networks.segmentation.HySparKUNet`."""
        if self.planned:
            return self.planned.arch_kwargs
        config = replace(self.architecture, base_width=self.base_width)
        return derive_arch_kwargs(PAPER_STRIDES, [(3, 3, 3)] * len(PAPER_STRIDES), config)

    @property
    def pretraining(self) -> HySparKConfig:
        """Settings of the step."""
        return replace(self.planned.pretraining if self.planned else self.settings, **STEPS[self.step])

    @property
    def grid(self) -> Size3:
        """Junction cells of a crop. Raises ValueError where the network's stride does not divide its size."""
        return divide(self.size, cumulative_strides(self.arch_kwargs["strides"])[-1], "crop of size")

    def check(self) -> None:
        """Raises ValueError if no such step can be made."""
        if self.batch < 1:
            raise ValueError(f"the batch is {self.batch}; expected at least one crop per step.")
        count_visible(self.grid, self.mask_ratio)


def variants(request: Request) -> list[str]:
    """What can be compared on the request's device."""
    auto = backend_on("auto", request.device)
    others = [name for name in OTHER_BACKENDS[request.device] if backend_on(name, request.device) is not auto]
    return [*VARIANTS, *(GPU_REFERENCES if request.device == "cuda" else ()), *others]


def is_backend(variant: str) -> bool:
    """Whether a variant is the block path by another backend."""
    return any(variant in names for names in OTHER_BACKENDS.values())


@functools.cache
def backend_on(name: str, device: str) -> Convolution:
    """A backend, compared with the reference on the device once."""
    return choose_backend(name, torch.device(device), print)


def build(request: Request, variant: str) -> tuple[HySparK, torch.Tensor, torch.Tensor]:
    """Network, image ``(B, C, D, H, W)`` and mask of a request, the same for every variant."""
    torch.manual_seed(0)
    model = build_hyspark(request.channels, request.arch_kwargs, request.pretraining)
    other = is_backend(variant)
    model.compute_with(backend_on(variant if other else "auto", request.device))
    model = (VARIANTS | GPU_REFERENCES)["blocks" if other else variant](model).to(request.device)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(request.batch, request.channels, *request.size, generator=generator).to(request.device)
    visible = model.draw_mask(request.batch, request.size, request.mask_ratio, generator).to(request.device)
    return model, image, visible


def autocast(request: Request) -> Any:
    """The precision's context."""
    dtype = PRECISIONS[request.precision]
    return torch.autocast(request.device, dtype=dtype, enabled=dtype != torch.float32)


def make_step(request: Request, variant: str) -> Callable[[], float]:
    """A whole training step as the trainer does it: forward, loss, backward, scaling for fp16, clipping, AdamW."""
    model, image, visible = build(request, variant)
    optimizer = torch.optim.AdamW(decay_groups(model, 0.05), lr=1e-4)
    scaler = torch.amp.GradScaler(request.device, enabled=request.precision == "fp16")
    network = torch.compile(model) if request.compile else model

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with autocast(request):
            reconstruction = network(image, visible)
        loss = reconstruction_loss(image, reconstruction, visible, model.target)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), request.pretraining.gradient_clip)
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    return step


def forget_compiled() -> None:
    """To be called before networks are compiled: PyTorch counts how often the same code is compiled, whatever the
    network, and soon runs it uncompiled without a word."""
    torch.compiler.reset()


def make_encoder(request: Request, variant: str, backward: bool) -> Callable[[], object]:
    """The encoder alone, forward or forward and backward."""
    return encoder_run(request, *build(request, variant), backward)


def encoder_run(
    request: Request, model: HySparK, image: torch.Tensor, visible: torch.Tensor, backward: bool
) -> Callable[[], object]:
    """The encoder of a network on images ``(B, C, D, H, W)`` with visible cells ``(B, g0, g1, g2)``."""

    def run() -> object:
        with torch.set_grad_enabled(backward):
            with autocast(request):
                layout = model.lay_out(visible)
                features = model.encode(image, layout)
            if backward:
                model.zero_grad(set_to_none=True)
                torch.stack([feature.float().square().mean() for feature in features]).sum().backward()
        return features

    return run
