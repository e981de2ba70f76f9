"""Float32 as it says, for comparisons."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32 in cuDNN's convolutions, where PyTorch allows it by default: it rounds inputs to 10 bits, so two exact
    ways to compute the same differ by 1e-3. Matrix products have none by default. Without effect on CPUs."""
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        yield
