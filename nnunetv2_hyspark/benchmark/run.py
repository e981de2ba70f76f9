"""The measurements of `hyspark benchmark`."""

from __future__ import annotations

import functools
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..geometry import as_size3, volume
from ..heap import keep_freed_memory
from ..masking import count_visible
from ..precision import exact_float32
from ..pretext.hyspark import reconstruction_loss
from ..transfer.description import package_versions
from .convolutions import measure_convolutions
from .loading import measure_loading, write_cases
from .memory import peak_gb
from .operations import counted_gb, forward_gmac
from .request import (
    OTHER_BACKENDS,
    PRECISIONS,
    Request,
    autocast,
    build,
    encoder_run,
    forget_compiled,
    make_encoder,
    make_step,
    variants,
)
from .segmentation import finetuning_run, make_segmentation, networks, parameters, predicted_size, prediction_run
from .sweep import COMPARED, sweep
from .tables import convolutions_table, loading_table, ratios_table, summary, sweep_table, table
from .timing import Timings, ceilings, interleave

OFFICIAL_STEP = "official release"
"""Row of the official release's own step, ``official-like`` with its decoder, beside ours."""


def check_agreement(request: Request) -> dict[str, dict[str, float]]:
    """Relative difference of every variant to the block path: of the loss, and (L2) of the reconstruction and of the
    encoder's gradients.

    The encoder's alone, because in the decoder single ReLU inputs within rounding of zero flip between variants; its
    gradients are compared by the tests, in float64.

    Raises:
        RuntimeError: above 1e-4; in half precision above 2e-2 in the loss and 0.1 in the others.
    """
    exact = request.precision == "float32"
    limits = dict.fromkeys(("loss", "reconstruction", "gradients"), 1e-4 if exact else 0.1)
    if not exact:
        limits["loss"] = 2e-2
    with exact_float32():
        reference = _computed(request, "blocks")
    differences: dict[str, dict[str, float]] = {what: {} for what in limits}
    for variant in variants(request):
        with exact_float32():
            found = _computed(request, variant)
        for what, value in found.items():
            differences[what][variant] = float((value - reference[what]).norm() / reference[what].norm())
    for what, limit in limits.items():
        wrong = {v: d for v, d in differences[what].items() if not d <= limit}
        if wrong:
            raise RuntimeError(
                f"variants disagree with the block path in their {what} by {wrong}, expected at most {limit}; figures "
                f"would not compare."
            )
    return differences


def _computed(request: Request, variant: str) -> dict[str, torch.Tensor]:
    model, image, visible = build(request, variant)
    with torch.no_grad(), autocast(request):
        reconstruction = model(image, visible)
        loss = reconstruction_loss(image, reconstruction, visible, model.target)
    with autocast(request):
        layout = model.lay_out(visible)
        features = [layout.scatter(feature) for feature in model.encode(image, layout)]
    total = torch.stack([feature.float().square().mean() for feature in features]).sum()
    # the gradients of a mean over so many voxels are below what float16 can hold
    scale = 2.0**16 if request.precision == "fp16" else 1.0
    of_encoder = torch.autograd.grad(scale * total, list(model.encoder.parameters()))
    gradients = torch.cat([gradient.flatten() for gradient in of_encoder]) / scale
    found = {"loss": loss, "reconstruction": reconstruction, "gradients": gradients}
    return {what: value.detach().float().cpu() for what, value in found.items()}


def check(request: Request, what: Sequence[str], ratios: Sequence[float], points: Sequence[Request]) -> None:
    """Raises ValueError for what could not be measured, before hours went into the rest."""
    for point in (request, *(points if "sweep" in what else ())):
        point.check()
    for ratio in ratios if "ratios" in what else ():
        count_visible(request.grid, ratio)


def measure(
    request: Request,
    what: Sequence[str],
    ratios: Sequence[float],
    points: Sequence[Request],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Runs the measurements.

    Args:
        request: network, sizes, precision, device.
        what: any of ``encoder``, ``step``, ``memory``, ``ratios``, ``sweep``, ``convolutions``, ``segmentation``,
            ``loading``.
        ratios: mask ratios of ``ratios``.
        points: of ``sweep``; see :func:`nnunetv2_hyspark.benchmark.sweep.sweep_points`.
        log: takes a line.

    Returns:
        Plain values for JSON.

    Raises:
        ValueError: if a size, batch or mask ratio does not fit the network.
    """
    check(request, what, ratios, points)
    device = torch.device(request.device)
    memory_is_kept = device.type == "cpu" and keep_freed_memory()  # as the trainers do
    top = ceilings(device, PRECISIONS[request.precision])
    results: dict[str, Any] = {
        "request": {**asdict(request), "settings": asdict(request.pretraining)},
        "machine": {
            "processor": processor_name(),
            "threads": torch.get_num_threads(),
            "freed_memory_is_kept": memory_is_kept,
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        },
        "versions": package_versions(),
        "relative_differences": check_agreement(request),
        "ceilings": top,
    }
    if "encoder" in what:
        for name, backward in (("encoder_forward", False), ("encoder_forward_backward", True)):
            results[name] = encoder(request, backward, top)
            log(table(name, results[name]))
    if "step" in what:
        results["step"] = training_step(request, top)
        log(table(f"training step ({request.step})", results["step"]))
    if "memory" in what:
        results["memory_gb"] = {
            v: peak_gb(functools.partial(make_step, request, v), device) for v in variants(request)
        }
        log("peak memory of a step, GB: " + ", ".join(f"{v} {gb:.2f}" for v, gb in results["memory_gb"].items()))
    if "ratios" in what:
        results["by_mask_ratio"] = by_ratio(request, ratios, device)
        log(ratios_table(results["by_mask_ratio"]))
    if "sweep" in what:
        results["sweep"] = sweep(points, top)
        log(sweep_table(results["sweep"]))
    if "convolutions" in what:
        results["convolutions"] = measure_convolutions(request)
        log(convolutions_table(results["convolutions"]))
    if "segmentation" in what:
        for name, training in (("finetuning_step", True), ("prediction", False)):
            results[name] = segmentation(request, training, top)
            log(table(f"segmentation, {name}", results[name]))
    if "loading" in what:
        results["loading"] = loading(request)
        log(loading_table(results["loading"]))
    return results


def _counted(variant: str) -> str:
    """The variant whose operations are counted for this one: backends of GPUs do the same as the block path with
    operators of their own, which PyTorch's counter does not know."""
    return "blocks" if variant in OTHER_BACKENDS["cuda"] else variant


def encoder(request: Request, backward: bool, top: Mapping[str, float]) -> dict[str, Any]:
    """The encoder's variants, forward or forward and backward."""
    runs = {v: make_encoder(request, v, backward) for v in variants(request)}
    timings = interleave(runs, request.repeats, request.budget, torch.device(request.device))
    gb = {v: counted_gb(run) for v, run in runs.items()}
    gmac = {v: forward_gmac(make_encoder(request, _counted(v), backward=False)) for v in runs}
    return summary(timings, top, gmac, gb, passes=3 if backward else 1)


def training_step(request: Request, top: Mapping[str, float]) -> dict[str, Any]:
    """The variants' whole steps, and what ours replaces: the official release's, with the decoder that it has.

    Operations and bytes are counted as they run without ``torch.compile``.
    """
    forget_compiled()
    steps = {variant: (request, variant) for variant in variants(request)}
    official = (replace(request, step="official"), "official-like")
    if request.step != "official" and _fits(official):
        steps[OFFICIAL_STEP] = official
    runs = {name: make_step(*step) for name, step in steps.items()}
    timings = interleave(runs, request.repeats, request.budget, torch.device(request.device))
    del runs
    gmac, gb = {}, {}
    for name, (of, variant) in steps.items():
        gb[name] = counted_gb(make_step(replace(of, compile=False), variant))
        model, image, visible = build(of, _counted(variant))
        gmac[name] = forward_gmac(functools.partial(model, image, visible))
    return summary(timings, top, gmac, gb, passes=3)


def _fits(step: tuple[Request, str]) -> bool:
    """Whether a GPU's memory is large enough for a step; CPUs have what they have."""
    if step[0].device != "cuda":
        return True
    try:
        make_step(*step)()
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True


def segmentation(request: Request, training: bool, top: Mapping[str, float]) -> dict[str, Any]:
    """Whole segmentation networks: forward and backward passes on dense patches, or sliding-window prediction."""
    made = networks(request)
    make_run = finetuning_run if training else prediction_run
    runs = {name: make_run(request, network) for name, network in made.items()}
    timings = interleave(runs, request.repeats, request.budget, torch.device(request.device))
    gmac = {name: forward_gmac(run) for name, run in runs.items()}
    gb = {name: counted_gb(run) for name, run in runs.items()}
    rows = summary(timings, top, gmac, gb, passes=3 if training else 1, reference="HySparKUNet")
    voxels = request.batch * volume(request.size) if training else volume(predicted_size(request))
    for name, row in rows.items():
        row["million_parameters"] = parameters(made[name])
        row["million_voxels_per_second"] = voxels / row["median_s"] / 1e6
        make = functools.partial(make_segmentation, request, name, training)
        row["memory_gb"] = peak_gb(make, torch.device(request.device))
    return rows


def loading(request: Request) -> dict[str, Any]:
    """Crops per second from synthetic cases of twice the crop's edges, and the waiting of a step of 10 ms."""
    step_seconds = 0.01
    with tempfile.TemporaryDirectory() as folder:
        shape = as_size3(2 * edge for edge in request.size)
        files = write_cases(Path(folder), 4, shape, request.size, request.channels)
        measured = measure_loading(files, request.size, request.grid, request.batch, (0, 1, 2, 4, 8), step_seconds)
    return {
        "case_voxels": list(shape), "step_seconds": step_seconds, "processors": os.cpu_count(), "by_workers": measured
    }


def by_ratio(request: Request, ratios: Sequence[float], device: torch.device) -> dict[str, dict[str, Any]]:
    """Encoder forward and backward at each mask ratio, and with every cell visible, in rounds.

    Returns:
        Of the block path and of the dense reference, per ratio, ``"0"`` among them, a row of :func:`summary`;
        ``ratio_to_0`` is the time over the same variant's with nothing hidden.
    """
    masks: dict[str, torch.Tensor] = {}
    runs: dict[str, Callable[[], object]] = {}
    for variant in COMPARED:
        model, image, visible = build(request, variant)
        if not masks:
            generator = torch.Generator().manual_seed(0)
            drawn = {str(r): model.draw_mask(request.batch, request.size, r, generator).to(device) for r in ratios}
            masks = {"0": torch.ones_like(visible), **drawn}
        for ratio, mask in masks.items():
            runs[f"{variant} {ratio}"] = encoder_run(request, model, image, mask, backward=True)
    timings = interleave(runs, request.repeats, request.budget, device)
    rows = {}
    for variant in COMPARED:
        seconds = {ratio: timings.seconds[f"{variant} {ratio}"] for ratio in masks}
        rows[variant] = summary(Timings(seconds), {}, reference="0")
    return rows


def processor_name() -> str:
    """The CPU's name, as far as the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            return next(line.split(":", 1)[1].strip() for line in stream if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
