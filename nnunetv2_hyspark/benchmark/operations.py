"""Counted multiplications of one forward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode


def forward_gmac(run: Callable[[], object]) -> float:
    """Giga multiply-adds of convolutions and matrix products in one call, counted from the shapes that really ran."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        run()
    return counter.get_total_flops() / 2e9
