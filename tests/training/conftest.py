"""A trainer on a tiny synthetic data set, in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nnunetv2_hyspark.training.progress import PretrainingLog
from tests.training.small_dataset import NAME, SETTINGS, write_small_dataset


@pytest.fixture
def small_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point_nnunet_to: Callable) -> Path:
    """Folders of nnU-Net in a temporary place, with a preprocessed data set; returns the data set's folder."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        point_nnunet_to(f"nnUNet_{name}", tmp_path / name)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    return write_small_dataset(tmp_path / "preprocessed")


@pytest.fixture
def make_trainer(small_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Makes a trainer: ``make_trainer("key=value", continue_training=True)``.

    ``draw`` is for progress.png, ``weights`` for ``-pretrained_weights``, ``validate`` for ``--val``.
    """
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def make(
        settings: str = "",
        continue_training: bool = False,
        draw: bool = False,
        trainer_name: str = "HySparKPretrainTrainer",
        fold: int = 0,
        weights: str | None = None,
        validate: bool = False,
    ):
        if not draw:
            monkeypatch.setattr(PretrainingLog, "plot_progress_png", lambda self, folder: None)
        monkeypatch.setenv("nnUNet_hyspark", f"{SETTINGS},{settings}".rstrip(","))
        trainer = get_trainer_from_args(
            NAME, "3d_fullres", fold, trainer_name, "nnUNetPlans", continue_training, torch.device("cpu")
        )
        maybe_load_checkpoint(trainer, continue_training, validate, weights)
        return trainer

    yield make
    torch.set_num_threads(threads)
