"""nnU-Net's per-epoch log and progress.png, for pre-training."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import numpy as np  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from nnunetv2.training.logging.nnunet_logger import LocalLogger  # noqa: E402

KEYS = (
    "train_losses",
    "val_losses",
    "lrs",
    "weight_decays",
    "gradient_norms",
    "clipped_steps",
    "crops_per_second",
    "waiting_for_data",
    "peak_memory_gb",
    "background_crops",
    "skipped_steps",
    "effective_rank",
    "reconstruction_deviation",
    "probe_dice",
    "epoch_start_timestamps",
    "epoch_end_timestamps",
)


class PretrainingLog(LocalLogger):
    """One value per epoch, NaN where nothing was measured.

    Losses; learning rate; weight decay; gradient norm (before clipping) and share of steps that were clipped; crops/s;
    share of the epoch spent waiting for data; peak memory in GB; share of crops that are background only; steps skipped
    for want of a finite loss; effective rank of the tokens; standard deviation of the prediction on masked voxels; Dice
    of the linear probe; timestamps in s.
    """

    def __init__(self) -> None:
        super().__init__()
        self.my_fantastic_logging: dict[str, list[Any]] = {key: [] for key in KEYS}

    def log(self, key: str, value: Any, epoch: int) -> None:
        """Sets the value of an epoch; an epoch that is continued or repeated replaces its own earlier values."""
        values = self.my_fantastic_logging[key]
        del values[epoch:]
        values.extend([math.nan] * (epoch - len(values)))
        values.append(value)

    def load_checkpoint(self, checkpoint: dict) -> None:
        """Restores the lists of a checkpoint."""
        self.my_fantastic_logging = {key: list(checkpoint.get(key, [])) for key in KEYS}

    def plot_progress_png(self, output_folder: str | os.PathLike[str]) -> None:
        """Writes ``progress.png``: losses and probe; rate and gradient norm; speed; health of the representation."""
        log = self.my_fantastic_logging
        figure, axes = plt.subplots(4, 1, figsize=(11, 16), sharex=True, constrained_layout=True)
        twins = [axis.twinx() for axis in axes]
        curves = (
            (axes[0], "train_losses", "training loss", "tab:blue", "reconstruction loss\n(masked cells)"),
            (axes[0], "val_losses", "validation loss", "tab:red", ""),
            (twins[0], "probe_dice", "Dice of the linear probe", "tab:green", "Dice"),
            (axes[1], "lrs", "learning rate", "tab:blue", "learning rate"),
            (twins[1], "gradient_norms", "gradient norm", "tab:orange", "gradient norm before clipping"),
            (axes[2], "crops_per_second", "crops per second", "tab:green", "crops per second"),
            (twins[2], "waiting_for_data", "share waiting for data", "tab:gray", "share of time waiting for data"),
            (axes[3], "effective_rank", "effective rank of the tokens", "tab:purple", "effective rank"),
            (twins[3], "reconstruction_deviation", "deviation of the prediction", "tab:brown", "standard deviation"),
        )
        for axis, key, label, color, ylabel in curves:
            epochs, values = _measured(log[key])
            marker = "o" if len(values) < 2 or key == "probe_dice" else ""
            axis.plot(epochs, values, label=label, color=color, marker=marker)
            if ylabel:
                axis.set_ylabel(ylabel)
        axes[2].set_ylim(bottom=0)
        twins[2].set_ylim(0, 1)
        twins[0].set_ylim(0, 1)
        if not _measured(log["probe_dice"])[0]:
            twins[0].set_axis_off()
        for axis, twin in zip(axes, twins):
            lines = [line for line in [*axis.get_lines(), *twin.get_lines()] if len(line.get_xdata())]
            if lines:
                axis.legend(lines, [line.get_label() for line in lines], loc="upper right")
            axis.grid(alpha=0.3)
        axes[-1].set_xlabel("epoch")
        figure.savefig(Path(output_folder) / "progress.png", dpi=100)
        plt.close(figure)


def _measured(values: Sequence[float]) -> tuple[list[int], list[float]]:
    pairs = [(epoch, value) for epoch, value in enumerate(values) if np.isfinite(value)]
    return [epoch for epoch, _ in pairs], [value for _, value in pairs]


def remaining_time(starts: Sequence[float], ends: Sequence[float], epochs_left: int) -> str:
    """Estimated time to the end of the training, from the median of the last ten epochs.

    Args:
        starts, ends: of the epochs that are done, s.
        epochs_left: to do.

    Returns:
        For example ``"2 d 03:15 h"``.
    """
    durations = [end - start for start, end in zip(starts, ends)][-10:]
    minutes = round(float(np.median(durations)) * epochs_left / 60) if durations else 0
    days, rest = divmod(minutes, 24 * 60)
    clock = f"{rest // 60:02d}:{rest % 60:02d} h"
    return f"{days} d {clock}" if days else clock
