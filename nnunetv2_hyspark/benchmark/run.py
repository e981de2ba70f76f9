"""The measurements of `hyspark benchmark`."""

from __future__ import annotations

import functools
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..geometry import Size3, as_size3, cumulative_strides, divide
from ..networks.topology import PAPER_STRIDES, ArchitectureConfig, derive_arch_kwargs
from ..pretext.build import build_hyspark
from ..pretext.hyspark import HySparK, HySparKConfig, reconstruction_loss
from ..training.parameters import decay_groups
from ..transfer.description import package_versions
from .loading import measure_loading, write_cases
from .memory import peak_gb
from .operations import forward_gmac
from .reference import dense_then_mask, official_like
from .segmentation import networks, parameters, segmentation_loss
from .timing import ceilings, interleave

STEPS = {
    "default": HySparKConfig(),
    "official": HySparKConfig(decoder_width=768, fuse_finest=False, decoder_norm="batch"),
}
VARIANTS: dict[str, Callable[[HySparK], HySparK]] = {
    "blocks": lambda model: model,
    "dense": dense_then_mask,
    "official-like": official_like,
}


@dataclass(frozen=True)
class Request:
    """What to measure."""

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


def build(request: Request, variant: str) -> tuple[HySparK, torch.Tensor, torch.Tensor]:
    """Network, image ``(B, 1, D, H, W)`` and mask of a request, the same for every variant."""
    torch.manual_seed(0)
    config = ArchitectureConfig(base_width=request.base_width)
    arch_kwargs = derive_arch_kwargs(PAPER_STRIDES, [(3, 3, 3)] * len(PAPER_STRIDES), config)
    model = VARIANTS[variant](build_hyspark(1, arch_kwargs, STEPS[request.step])).to(request.device)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(request.batch, 1, *request.size, generator=generator).to(request.device)
    visible = model.draw_mask(request.batch, request.size, request.mask_ratio, generator).to(request.device)
    return model, image, visible


def autocast(request: Request) -> Any:
    """The precision's context."""
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[request.precision]
    return torch.autocast(request.device, dtype=dtype, enabled=dtype != torch.float32)


def make_step(request: Request, variant: str) -> Callable[[], float]:
    """A whole training step: zero_grad, forward, loss, backward, AdamW."""
    model, image, visible = build(request, variant)
    optimizer = torch.optim.AdamW(decay_groups(model, 0.05), lr=1e-4)
    network = torch.compile(model) if request.compile else model

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with autocast(request):
            reconstruction = network(image, visible)
        loss = reconstruction_loss(image, reconstruction, visible)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def make_encoder(request: Request, variant: str, backward: bool) -> Callable[[], object]:
    """The encoder alone, forward or forward and backward."""
    model, image, visible = build(request, variant)

    def run() -> object:
        with torch.set_grad_enabled(backward):
            with autocast(request):
                layout = model.lay_out(visible)
                features = model.encoder(layout.gather(image), layout)
            if backward:
                model.zero_grad(set_to_none=True)
                sum(feature.float().square().mean() for feature in features).backward()
        return features

    return run


def check_agreement(request: Request) -> dict[str, dict[str, float]]:
    """Largest relative difference of every variant to the block path: of the loss, and (L2) of the encoder's gradients.

    The encoder's alone, because in the decoder single ReLU inputs within rounding of zero flip between variants; its
    gradients are compared by the tests, in float64.

    Raises:
        RuntimeError: above 1e-4; in half precision above 2e-2 in the loss and 0.1 in the gradients.
    """
    losses, gradients = {}, {}
    for variant in VARIANTS:
        model, image, visible = build(request, variant)
        with torch.no_grad(), autocast(request):
            losses[variant] = reconstruction_loss(image, model(image, visible), visible).item()
        with autocast(request):
            layout = model.lay_out(visible)
            features = [layout.scatter(feature) for feature in model.encoder(layout.gather(image), layout)]
        total = torch.stack([feature.float().square().mean() for feature in features]).sum()
        of_encoder = torch.autograd.grad(total, list(model.encoder.parameters()))
        gradients[variant] = torch.cat([gradient.flatten() for gradient in of_encoder]).cpu()
        del model, layout, features, total
    limits = {"loss": 1e-4, "gradients": 1e-4} if request.precision == "float32" else {"loss": 2e-2, "gradients": 0.1}
    reference = gradients["blocks"]
    differences = {
        "loss": {v: abs(loss - losses["blocks"]) / abs(losses["blocks"]) for v, loss in losses.items()},
        "gradients": {v: float((g - reference).norm() / reference.norm()) for v, g in gradients.items()},
    }
    for what, limit in limits.items():
        wrong = {v: d for v, d in differences[what].items() if not d <= limit}
        if wrong:
            raise RuntimeError(
                f"variants disagree with the block path in their {what} by {wrong}, expected at most {limit}; figures "
                f"would not compare."
            )
    return differences


def measure(request: Request, what: list[str], ratios: list[float], log: Callable[[str], None]) -> dict[str, Any]:
    """Runs the measurements.

    Args:
        request: sizes, precision, device.
        what: any of ``encoder``, ``step``, ``memory``, ``ratios``, ``segmentation``, ``loading``.
        ratios: mask ratios of the last one.
        log: takes a line.

    Returns:
        Plain values for JSON.
    """
    device = torch.device(request.device)
    results: dict[str, Any] = {
        "request": asdict(request),
        "machine": {
            "processor": processor_name(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        },
        "versions": package_versions(),
        "relative_differences": check_agreement(request),
        "ceilings": ceilings(device),
    }
    top = results["ceilings"]["matmul_gflops"]
    if "encoder" in what:
        for name, backward in (("encoder_forward", False), ("encoder_forward_backward", True)):
            runs = {v: make_encoder(request, v, backward) for v in VARIANTS}
            timings = interleave(runs, request.repeats, request.budget, device)
            gmac = {v: forward_gmac(run) for v, run in runs.items()} if not backward else None
            results[name] = summary(timings, gmac, top)
            log(table(name, results[name]))
    if "step" in what:
        timings = interleave({v: make_step(request, v) for v in VARIANTS}, request.repeats, request.budget, device)
        gmac = {}
        for variant in VARIANTS:
            model, image, visible = build(request, variant)
            gmac[variant] = forward_gmac(functools.partial(model, image, visible))
        results["step"] = summary(timings, gmac, top, passes=3)
        log(table(f"training step ({request.step})", results["step"]))
    if "memory" in what:
        results["memory_gb"] = {
            v: peak_gb(functools.partial(make_step, request, v), device) for v in VARIANTS
        }
        log("peak memory of a step, GB: " + ", ".join(f"{v} {gb:.2f}" for v, gb in results["memory_gb"].items()))
    if "ratios" in what:
        results["by_mask_ratio"] = by_ratio(request, ratios, device)
        log("encoder forward+backward over its time with nothing hidden: "
            + ", ".join(f"{r}: {v:.3f} (1-r = {1 - float(r):.2f})" for r, v in results["by_mask_ratio"].items()))
    if "segmentation" in what:
        for name, training in (("finetuning_step", True), ("prediction", False)):
            results[name] = segmentation(request, training, top)
            log(table(f"segmentation, {name}", results[name]))
    if "loading" in what:
        results["loading"] = loading(request)
        log(loading_table(results["loading"]))
    return results


def segmentation(request: Request, training: bool, top: float) -> dict[str, Any]:
    """Forward and backward passes, or forwards alone, of whole segmentation networks on dense patches."""
    image = torch.randn(request.batch, 1, *request.size, generator=torch.Generator().manual_seed(0)).to(request.device)

    def make(network: Any) -> Callable[[], object]:
        network = network.to(request.device).train(training)
        network.decoder.deep_supervision = training

        def run() -> object:
            with torch.set_grad_enabled(training and torch.is_grad_enabled()), autocast(request):
                outputs = network(image)
            if training and torch.is_grad_enabled():
                network.zero_grad(set_to_none=True)
                segmentation_loss(outputs).backward()
            return outputs

        return run

    made = networks(request.base_width)
    runs = {name: make(network) for name, network in made.items()}
    timings = interleave(runs, request.repeats, request.budget, torch.device(request.device))
    gmac = {name: forward_gmac(run) for name, run in runs.items()}
    rows = summary(timings, gmac, top, passes=3 if training else 1, reference="HySparKUNet")
    voxels = image.numel()
    for name, row in rows.items():
        row["million_parameters"] = parameters(made[name])
        row["million_voxels_per_second"] = voxels / row["median_s"] / 1e6
    return rows


def loading(request: Request) -> dict[str, Any]:
    """Crops per second from synthetic cases of twice the crop's edges, and the waiting of a step of 10 ms."""
    step_seconds = 0.01
    grid = divide(request.size, cumulative_strides(PAPER_STRIDES)[-1], "crop of size")
    with tempfile.TemporaryDirectory() as folder:
        shape = as_size3(2 * edge for edge in request.size)
        files = write_cases(Path(folder), 4, shape, request.size)
        measured = measure_loading(files, request.size, grid, request.batch, (0, 1, 2, 4, 8), step_seconds)
    return {
        "case_voxels": list(shape), "step_seconds": step_seconds, "processors": os.cpu_count(), "by_workers": measured
    }


def loading_table(figures: dict[str, Any]) -> str:
    """Lines for the screen."""
    lines = [f"loading, {figures['processors']} processors:", f"  {'workers':<9}{'crops/s':>9}{'waiting':>9}"]
    for workers, row in figures["by_workers"].items():
        lines.append(f"  {workers:<9}{row['crops_per_second']:>9.1f}{row['waiting_share']:>9.1%}")
    return "\n".join(lines)


def by_ratio(request: Request, ratios: list[float], device: torch.device) -> dict[str, float]:
    """Encoder forward and backward at each mask ratio over the same with every cell visible, in rounds."""
    model, image, visible = build(request, "blocks")
    generator = torch.Generator().manual_seed(0)

    def run_with(mask: torch.Tensor) -> Callable[[], object]:
        def run() -> object:
            with autocast(request):
                layout = model.lay_out(mask)
                features = model.encoder(layout.gather(image), layout)
            model.zero_grad(set_to_none=True)
            sum(feature.float().square().mean() for feature in features).backward()
            return features

        return run

    runs = {"0": run_with(torch.ones_like(visible))}
    for ratio in ratios:
        mask = model.draw_mask(request.batch, request.size, ratio, generator).to(device)
        runs[str(ratio)] = run_with(mask)
    timings = interleave(runs, request.repeats, request.budget, device)
    return {str(ratio): 1 / timings.ratio("0", str(ratio)) for ratio in ratios}


def summary(
    timings: Any, gmac: dict[str, float] | None, top: float, passes: int = 1, reference: str = "blocks"
) -> dict[str, Any]:
    """Medians, spread, ratios to the reference, counted operations and share of the matmul ceiling."""
    rows = {}
    for variant, median in timings.medians().items():
        row = {
            "median_s": median,
            "min_s": min(timings.seconds[variant]),
            "max_s": max(timings.seconds[variant]),
            "repeats": len(timings.seconds[variant]),
            f"ratio_to_{reference}": timings.ratio(variant, reference),
        }
        if gmac:
            row["forward_gmac"] = gmac[variant]
            row["share_of_matmul_ceiling"] = 2 * passes * gmac[variant] / median / top
        rows[variant] = row
    return rows


def table(title: str, rows: dict[str, Any]) -> str:
    """Lines for the screen."""
    ratio = next(key for key in next(iter(rows.values())) if key.startswith("ratio_to_"))
    against = f"x {ratio.removeprefix('ratio_to_')}"
    head = f"  {'variant':<15}{'median s':>10}{'min':>9}{'max':>9}{against:>15}{'GMAC':>9}{'of peak':>9}"
    lines = [f"{title}:", head]
    for variant, row in rows.items():
        extra = f"{row['forward_gmac']:>9.1f}{row['share_of_matmul_ceiling']:>9.0%}" if "forward_gmac" in row else ""
        lines.append(f"  {variant:<15}{row['median_s']:>10.3f}{row['min_s']:>9.3f}{row['max_s']:>9.3f}"
                     f"{row[ratio]:>15.2f}{extra}")
    return "\n".join(lines)


def processor_name() -> str:
    """The CPU's name, as far as the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            return next(line.split(":", 1)[1].strip() for line in stream if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
