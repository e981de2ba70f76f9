"""How much memory a process has needed."""

from __future__ import annotations

import math
import sys

import torch


def peak_memory_gb(device: torch.device) -> float:
    """Peak of the GPU since its counter was reset; on the CPU the process's largest resident set so far; in 1e9 bytes.

    NaN where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
