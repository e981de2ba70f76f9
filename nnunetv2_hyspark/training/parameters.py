"""Which parameters decay."""

from __future__ import annotations

from typing import Any

from torch import nn


def decay_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups: matrices and kernels with weight decay; vectors (norms, biases, tokens) without."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
