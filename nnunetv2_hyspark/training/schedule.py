"""Learning-rate schedule: linear warm-up, then half a cosine to zero."""

from __future__ import annotations

import math

from torch.optim import Optimizer


def warmup_cosine(progress: float, warmup: float) -> float:
    """Factor of the peak rate.

    Args:
        progress: fraction of the run that is done, [0, 1].
        warmup: fraction of the run that warms up, [0, 1).

    Returns:
        Rises linearly to 1 at ``warmup``, then falls as half a cosine to 0 at 1.
    """
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * min((progress - warmup) / (1 - warmup), 1.0)))


class WarmupCosineSchedule:
    """Sets every group's rate to ``peak * lr_scale * factor``; a function of the step alone, so it needs no state.

    Args:
        optimizer: its groups may hold ``lr_scale``.
        peak: rate at the end of the warm-up.
        epochs: length of the run.
        warmup_epochs: length of the warm-up; a tenth of the run at most.
        iterations_per_epoch: steps per epoch.
        frozen_epochs: first epochs in which groups named ``encoder*`` have rate 0; after them these warm up by
            themselves, for as long as the run did: their gradients are new to the optimizer.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        peak: float,
        epochs: int,
        warmup_epochs: float,
        iterations_per_epoch: int,
        frozen_epochs: int = 0,
    ):
        self.optimizer = optimizer
        self.peak = peak
        self.epochs = epochs
        self.iterations_per_epoch = iterations_per_epoch
        self.warmup = min(warmup_epochs, 0.1 * epochs) / epochs
        self.frozen_epochs = frozen_epochs
        self.set_step(0)

    def set_step(self, step: int) -> None:
        """Rates of optimizer step ``step`` (from 0). The first step of a warm-up has a rate above zero."""
        total = self.epochs * self.iterations_per_epoch
        rate = self.peak * warmup_cosine((step + (1 if self.warmup else 0)) / (total + 1), self.warmup)
        for group in self.optimizer.param_groups:
            is_encoder = str(group.get("name", "")).startswith("encoder")
            share = self._share_of_the_encoder(step) if is_encoder else 1.0
            group["lr"] = rate * share * group.get("lr_scale", 1.0)

    def _share_of_the_encoder(self, step: int) -> float:
        """0 while it is frozen, rising to 1 after that."""
        if not self.frozen_epochs:
            return 1.0
        trained = step - self.frozen_epochs * self.iterations_per_epoch + 1
        return min(max(trained / max(self.warmup * self.epochs * self.iterations_per_epoch, 1), 0.0), 1.0)

    def step(self, epoch: int) -> None:
        """Rates of the first step of an epoch; nnU-Net calls this at every epoch's start."""
        self.set_step(epoch * self.iterations_per_epoch)
