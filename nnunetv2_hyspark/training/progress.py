"""nnU-Net's per-epoch log and progress.png, for pre-training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402
from nnunetv2.training.logging.nnunet_logger import LocalLogger  # noqa: E402

KEYS = (
    "train_losses",
    "val_losses",
    "lrs",
    "gradient_norms",
    "crops_per_second",
    "waiting_for_data",
    "peak_memory_gb",
    "epoch_start_timestamps",
    "epoch_end_timestamps",
)


class PretrainingLog(LocalLogger):
    """One value per epoch: losses, learning rate, gradient norm (before clipping), crops/s, share of the epoch spent
    waiting for data, peak memory in GB, timestamps in s."""

    def __init__(self) -> None:
        super().__init__()
        self.my_fantastic_logging: dict[str, list[Any]] = {key: [] for key in KEYS}

    def load_checkpoint(self, checkpoint: dict) -> None:
        """Restores the lists of a checkpoint."""
        self.my_fantastic_logging = {key: list(checkpoint.get(key, [])) for key in KEYS}

    def plot_progress_png(self, output_folder: str | os.PathLike[str]) -> None:
        """Writes ``progress.png``: losses; learning rate and gradient norm; speed."""
        log = self.my_fantastic_logging
        figure, axes = plt.subplots(3, 1, figsize=(11, 13), sharex=True, constrained_layout=True)
        axes[0].plot(log["train_losses"], label="training loss", color="tab:blue")
        axes[0].plot(log["val_losses"], label="validation loss", color="tab:red")
        axes[0].set_ylabel("reconstruction loss\n(masked cells, normalised)")
        axes[1].plot(log["lrs"], label="learning rate", color="tab:blue")
        axes[1].set_ylabel("learning rate")
        norm = axes[1].twinx()
        norm.plot(log["gradient_norms"], label="gradient norm", color="tab:orange")
        norm.set_ylabel("gradient norm before clipping")
        axes[2].plot(log["crops_per_second"], label="crops per second", color="tab:green")
        axes[2].set_ylabel("crops per second")
        axes[2].set_ylim(bottom=0)
        wait = axes[2].twinx()
        wait.plot(log["waiting_for_data"], label="share waiting for data", color="tab:gray", linestyle="dotted")
        wait.set_ylim(0, 1)
        wait.set_ylabel("share of time waiting for data")
        for axis, twin in ((axes[0], None), (axes[1], norm), (axes[2], wait)):
            lines = axis.get_lines() + (twin.get_lines() if twin else [])
            axis.legend(lines, [line.get_label() for line in lines], loc="upper right")
            axis.grid(alpha=0.3)
        axes[2].set_xlabel("epoch")
        figure.savefig(Path(output_folder) / "progress.png", dpi=100)
        plt.close(figure)
