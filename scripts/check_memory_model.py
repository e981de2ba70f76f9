#!/usr/bin/env python
"""Compares the planner's memory model with measured peaks.

On a CUDA device real steps of the trainers' kind are run in mixed precision, and PyTorch's peak is compared with the
model (its allowance for the CUDA context left out, since PyTorch does not count that). The model is to be within 15 %.

On the CPU small steps are run in float32, and the peak of PyTorch's CPU allocator is compared with the tensors that the
model counts. That checks the counting, which does not depend on the device; it says nothing about cuDNN's workspace.

    python scripts/check_memory_model.py --device cuda
    python scripts/check_memory_model.py --device cpu
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnunetv2_hyspark.linear import layer_by_layer
from nnunetv2_hyspark.networks.segmentation import HySparKUNet
from nnunetv2_hyspark.networks.topology import ArchitectureConfig, derive_arch_kwargs
from nnunetv2_hyspark.planning.memory import CONTEXT_BYTES, GB, device_bytes
from nnunetv2_hyspark.planning.steps import trace_finetuning, trace_pretraining
from nnunetv2_hyspark.planning.topology import plan_topology
from nnunetv2_hyspark.planning.trace import StepMemory
from nnunetv2_hyspark.pretext.build import build_hyspark
from nnunetv2_hyspark.pretext.hyspark import HySparKConfig, reconstruction_loss

TARGET = 0.15


@dataclass(frozen=True)
class Case:
    """A step to measure; spacing in mm, patch in voxels."""

    name: str
    spacing: tuple[float, float, float]
    patch: tuple[int, int, int]
    crops: int
    channels: int = 1
    classes: int = 3
    base_width: int = 32
    max_stride: int = 16

    def arch_kwargs(self) -> dict[str, Any]:
        """Of the planner's network for a large image of this spacing."""
        topology = plan_topology(self.spacing, [4 * p for p in self.patch], self.max_stride)
        config = ArchitectureConfig(base_width=self.base_width, max_stride=self.max_stride)
        return derive_arch_kwargs(topology.strides, topology.kernel_sizes, config)


ON_CUDA = (
    Case("cubic, small", (1, 1, 1), (64, 64, 64), 2),
    Case("cubic, 8 GB plan", (1, 1, 1), (96, 96, 96), 2),
    Case("cubic, 24 GB plan", (1, 1, 1), (128, 128, 128), 2),
    Case("anisotropic", (3, 0.6, 0.6), (20, 256, 224), 2),
    Case("four channels, many classes", (1, 1, 1), (96, 96, 96), 2, channels=4, classes=20),
)
ON_CPU = (
    Case("cubic", (1, 1, 1), (32, 32, 32), 2, base_width=16, max_stride=8),
    Case("anisotropic", (3, 0.6, 0.6), (16, 64, 64), 1, base_width=16),
    Case("four channels, many classes", (1, 1, 1), (32, 32, 32), 2, 4, 20, base_width=16, max_stride=8),
)


def pretraining_step(case: Case, config: HySparKConfig, device: torch.device) -> Callable[[], None]:
    """A step as HySparKPretrainTrainer does it."""
    network = build_hyspark(case.channels, case.arch_kwargs(), config).to(device).train()
    image = torch.randn(case.crops, case.channels, *case.patch, device=device)
    visible = network.draw_mask(case.crops, case.patch, config.mask_ratio, torch.Generator(device))

    def loss() -> torch.Tensor:
        with torch.autocast(device.type, enabled=device.type == "cuda"):
            reconstruction = network(image, visible)
        return reconstruction_loss(image, reconstruction, visible)

    return _optimized(network, loss, device)


def finetuning_step(case: Case, device: torch.device) -> Callable[[], None]:
    """A step as HySparKFinetuneTrainer does it."""
    network = HySparKUNet(case.channels, case.classes, **case.arch_kwargs(), deep_supervision=True).to(device).train()
    options = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    criterion = DC_and_CE_loss(options, {}, dice_class=MemoryEfficientSoftDiceLoss)
    image = torch.randn(case.crops, case.channels, *case.patch, device=device)

    def loss() -> torch.Tensor:
        with torch.autocast(device.type, enabled=device.type == "cuda"):
            outputs = network(image)
            sizes = [output.shape[2:] for output in outputs]
            targets = [torch.zeros(case.crops, 1, *size, dtype=torch.int16, device=device) for size in sizes]
            losses = [criterion(output, target) for output, target in zip(outputs, targets)]
        return torch.stack(losses).sum()

    return _optimized(network, loss, device)


def _optimized(network: torch.nn.Module, loss: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], None]:
    if device.type != "cuda":  # the counting alone: forward and backward
        return lambda: loss().backward()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler("cuda", init_scale=1.0)  # or the first steps overflow and leave AdamW's moments out

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    return step


def cuda_peak(step: Callable[[], None]) -> int:
    """Largest sum of allocated bytes in a step.

    The steps before it try convolution algorithms, with the largest workspaces that fit on this card: on a card of the
    planned size they are smaller, so they are left out.
    """
    torch.backends.cudnn.benchmark = True
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def cpu_peak(step: Callable[[], None]) -> int:
    """Largest sum of bytes that PyTorch's CPU allocator has given out since the step began."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        activities = [torch.profiler.ProfilerActivity.CPU]
        with layer_by_layer(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            step()
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        now += change
        peak = max(peak, now)
    return peak


def compare(case: Case, device: torch.device) -> list[tuple[str, float, float]]:
    """(kind of step, predicted bytes, measured bytes) of pre-training with either decoder and of fine-tuning."""
    mixed = device.type == "cuda"
    kwargs = case.arch_kwargs()
    steps: list[tuple[str, Callable[[], Callable[[], None]], StepMemory]] = []
    for decoder in ("segmentation", "reconstruction"):
        config = HySparKConfig(decoder=decoder)
        trace = trace_pretraining(case.channels, kwargs, config, case.patch, case.crops, mixed)
        steps.append((f"pre-training, {decoder}", partial(pretraining_step, case, config, device), trace))
    trace = trace_finetuning(case.channels, case.classes, kwargs, case.patch, case.crops, mixed)
    steps.append(("fine-tuning", partial(finetuning_step, case, device), trace))
    rows = []
    for kind, make, trace in steps:  # one network at a time is on the device
        if mixed:
            rows.append((kind, device_bytes(trace) - CONTEXT_BYTES, float(cuda_peak(make()))))
        else:
            rows.append((kind, float(trace.peak - trace.weights), float(cpu_peak(make()))))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 0 if all errors are within the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch sees no CUDA device; use --device cpu to check the counting alone.", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    if options.device == "cuda":
        print(torch.cuda.get_device_name())
    print(f"{'case':<30}{'step':<30}{'model (GB)':>12}{'measured':>12}{'error':>9}")
    worst = 0.0
    for case in ON_CUDA if options.device == "cuda" else ON_CPU:
        for kind, predicted, measured in compare(case, device):
            error = predicted / measured - 1
            worst = max(worst, abs(error))
            print(f"{case.name:<30}{kind:<30}{predicted / GB:>12.3f}{measured / GB:>12.3f}{error:>9.1%}", flush=True)
    print(f"largest error {worst:.1%}, target {TARGET:.0%}")
    return 0 if worst <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
