"""Interleaved timings and paired ratios."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch


@dataclass(frozen=True)
class Timings:
    """Seconds of every repeat per variant, in the order they ran."""

    seconds: dict[str, list[float]]

    def medians(self) -> dict[str, float]:
        """Median seconds per variant."""
        return {name: median(values) for name, values in self.seconds.items()}

    def ratio(self, slow: str, fast: str) -> float:
        """Median over repeats of ``slow / fast``, both from the same round."""
        return median(a / b for a, b in zip(self.seconds[slow], self.seconds[fast]))


def interleave(
    variants: Mapping[str, Callable[[], object]], repeats: int, budget: float, device: torch.device
) -> Timings:
    """Times variants in rounds, each round in another order, after one round that does not count.

    Args:
        variants: what to run, by name.
        repeats: rounds that count.
        budget: seconds after which no further round starts; one round is always counted.
        device: synchronised around every run.

    Raises:
        ValueError: if there is nothing to time.
    """
    if not variants or repeats < 1:
        raise ValueError(f"there are {len(variants)} variants and {repeats} repeats; expected at least one of each.")
    names = list(variants)
    start = perf_counter()
    # on a GPU the first call compiles kernels and tries algorithms, and the second sorts out memory
    for name in names * (2 if device.type == "cuda" else 1):
        variants[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repeats):
        if number and perf_counter() - start > budget:
            break
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            _wait(device)
            begin = perf_counter()
            variants[name]()
            _wait(device)
            seconds[name].append(perf_counter() - begin)
    return Timings(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceilings(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """This machine's arithmetic in GFLOP/s and copy in GB/s (bytes read plus written).

    The arithmetic is the faster of a matrix multiplication and, on a CPU, a 3x3x3 convolution of 128 channels: the two
    come from different libraries there, of which one may not use all of the processor. On a GPU the multiplication is
    in the given precision, float32 with TF32 as convolutions are by default, and larger and repeated, so that its start
    does not count.
    """
    on_gpu = device.type == "cuda"
    size, calls = (8192, 20) if on_gpu else (2048, 1)
    kind = dtype if on_gpu else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    source = torch.randn(2**28 if on_gpu else 2**25, device=device)
    target = torch.empty_like(source)
    edge, channels = 24, 128
    image = torch.randn(1, channels, edge, edge, edge, device=device).contiguous(memory_format=torch.channels_last_3d)
    kernel = torch.randn(channels, channels, 3, 3, 3, device=device)

    def multiply() -> None:
        for _ in range(calls):
            torch.mm(a, b)

    def copy() -> None:
        for _ in range(calls):
            target.copy_(source)

    def convolve() -> None:
        torch.nn.functional.conv3d(image, kernel, padding=1)

    runs = {"matmul": multiply, "copy": copy} if on_gpu else {"matmul": multiply, "copy": copy, "convolution": convolve}
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on_gpu
    try:
        timings = interleave(runs, 5, 30, device).medians()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    arithmetic = [calls * 2 * size**3 / timings["matmul"]]
    if not on_gpu:
        arithmetic.append(2 * channels**2 * 27 * edge**3 / timings["convolution"])
    return {
        "peak_gflops": max(arithmetic) / 1e9,
        "copy_gbs": calls * 2 * source.numel() * 4 / timings["copy"] / 1e9,
    }
