"""What has been measured in the epoch that is running: kept so that a run can go on in the middle of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass
class EpochSoFar:
    """Measurements of an epoch's steps.

    Attributes:
        step: optimizer steps that are done, skipped ones included.
        losses: of steps with a finite loss.
        gradient_norms: before clipping, of the same steps.
        crops: of all processes.
        background: nearly constant crops among this process's own.
        own_crops: of this process.
        seconds: spent in training.
        waited: seconds of them spent waiting for data.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    crops: int = 0
    background: int = 0
    own_crops: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    @classmethod
    def restore(cls, state: Mapping[str, Any] | None) -> EpochSoFar:
        """From a checkpoint; a fresh epoch if it was written between epochs."""
        return cls(**state) if state else cls()

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    def means(self, clip: float) -> dict[str, float]:
        """Mean loss and gradient norm, share of steps whose norm was clipped, speed, waiting, share of background.

        Args:
            clip: norm at which gradients are clipped.
        """
        norms = [norm for norm in self.gradient_norms if np.isfinite(norm)]
        seconds = max(self.seconds, 1e-9)
        return {
            "train_losses": float(np.mean(self.losses)) if self.losses else float("nan"),
            "gradient_norms": float(np.mean(norms)) if norms else float("nan"),
            "clipped_steps": float(np.mean([norm > clip for norm in norms])) if norms else 0.0,
            "crops_per_second": self.crops / seconds,
            "waiting_for_data": self.waited / seconds,
            "skipped_steps": float(self.step - len(self.losses)),
            "background_crops": self.background / max(self.own_crops, 1),
        }
