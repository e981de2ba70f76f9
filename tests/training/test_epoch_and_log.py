"""Measurements of an epoch, the log of epochs, and the words about them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from nnunetv2_hyspark.training.diagnosis import effective_rank, new_signs, signs_of_trouble
from nnunetv2_hyspark.training.epoch import EpochSoFar
from nnunetv2_hyspark.training.incidents import MAX_STORED, NonFiniteGuard
from nnunetv2_hyspark.training.progress import KEYS, PretrainingLog, remaining_time


def test_an_epoch_survives_a_checkpoint() -> None:
    epoch = EpochSoFar(3, [1.0, 0.5], [2.0, 6.0], 6, 1, 6, 2.0, 0.5)
    assert EpochSoFar.restore(epoch.state()) == epoch
    assert EpochSoFar.restore(None) == EpochSoFar()
    means = epoch.means(5.0)
    assert means == {
        "train_losses": 0.75, "gradient_norms": 4.0, "clipped_steps": 0.5, "crops_per_second": 3.0,
        "waiting_for_data": 0.25, "skipped_steps": 1.0, "background_crops": pytest.approx(1 / 6),
    }


def test_an_epoch_without_any_finite_loss() -> None:
    assert math.isnan(EpochSoFar(step=2).means(1.0)["train_losses"])


def test_log_replaces_and_fills() -> None:
    log = PretrainingLog()
    for epoch in range(3):
        log.log("train_losses", float(epoch), epoch)
    log.log("train_losses", 9.0, 1)
    assert log.get_value("train_losses", None) == [0.0, 9.0]
    log.log("probe_dice", 0.5, 2)
    assert log.get_value("probe_dice", -1) == 0.5 and math.isnan(log.get_value("probe_dice", 0))
    other = PretrainingLog()
    other.load_checkpoint({"train_losses": [1.0]})
    assert other.get_value("train_losses", None) == [1.0] and set(other.get_checkpoint()) == set(KEYS)


@pytest.mark.parametrize("epochs", [0, 1, 5])
def test_progress_is_drawn_at_any_length(tmp_path: Path, epochs: int) -> None:
    log = PretrainingLog()
    for epoch in range(epochs):
        for key in KEYS:
            log.log(key, 0.5 if key != "probe_dice" or epoch == 3 else math.nan, epoch)
    log.plot_progress_png(tmp_path)
    assert (tmp_path / "progress.png").stat().st_size > 1000


def test_remaining_time() -> None:
    assert remaining_time([0.0, 60.0], [60.0, 120.0], 90) == "01:30 h"
    assert remaining_time([0.0], [3600.0], 50) == "2 d 02:00 h"
    assert remaining_time([], [], 50) == "00:00 h"


def test_effective_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    line = torch.randn(200, 1, generator=generator) * torch.randn(1, 16, generator=generator)
    full = torch.randn(4000, 16, generator=generator)
    assert effective_rank(line) == pytest.approx(1, abs=0.01)
    assert effective_rank(full) == pytest.approx(16, abs=0.5)
    assert effective_rank(torch.ones(10, 16)) == 1
    assert math.isnan(effective_rank(torch.full((3, 3), math.nan)))


def healthy(epochs: int = 40) -> dict[str, list[float]]:
    return {
        "train_losses": [1 / (1 + 0.05 * e) for e in range(epochs)],
        "lrs": [1e-4] * epochs,
        "reconstruction_deviation": [0.5] * epochs,
        "effective_rank": [30.0] * epochs,
        "clipped_steps": [0.1] * epochs,
        "background_crops": [0.0] * epochs,
        "waiting_for_data": [0.01] * epochs,
    }


@pytest.mark.parametrize(
    ("key", "value", "name", "word"),
    [
        ("train_losses", 1.0, "flat", "mean"),
        ("train_losses", 0.6, "flat", "converged"),
        ("reconstruction_deviation", 0.01, "constant", "constant"),
        ("effective_rank", 1.5, "collapsed", "collapsed"),
        ("clipped_steps", 1.0, "clipped", "gradient_clip"),
        ("background_crops", 0.5, "background", "background only"),
        ("waiting_for_data", 0.8, "waiting", "nnUNet_n_proc_DA"),
    ],
)
def test_signs_of_trouble(key: str, value: float, name: str, word: str) -> None:
    assert signs_of_trouble(healthy(), 1e-4) == {}
    log = {**healthy(), key: [value] * 40}
    signs = signs_of_trouble(log, 1e-4)
    assert set(signs) == {name} and word in signs[name]
    assert new_signs(log, 1e-4) == [], "it has been said before"
    assert new_signs({k: v[:20] for k, v in log.items()}, 1e-4) == list(signs.values())


def test_no_alarm_at_the_end_of_the_schedule_nor_at_the_start() -> None:
    log = {**healthy(), "train_losses": [0.6] * 40, "lrs": [1e-7] * 40}
    assert signs_of_trouble(log, 1e-4) == {}
    assert signs_of_trouble({k: [v[0]] * 19 for k, v in log.items()}, 1e-4) == {}


def test_a_rising_loss() -> None:
    log = {**healthy(), "train_losses": [0.5 + 0.02 * e for e in range(40)]}
    assert set(signs_of_trouble(log, 1e-4)) == {"rising"}


def test_every_process_stores_its_own_first_batches(tmp_path: Path) -> None:
    lines: list[str] = []
    batch = {
        "keys": ["a"], "corners": [(0, 0, 0)], "flips": [()], "mask_seeds": [1], "data": torch.zeros(1, 1, 2, 2, 2),
        "visible": torch.ones(1, 1, 1, 1, dtype=torch.bool),
    }
    guards = {rank: NonFiniteGuard(tmp_path / "incidents", 100, lines.append) for rank in (0, 1, 11)}
    for step in range(MAX_STORED + 2):
        for rank, guard in guards.items():
            guard.report(batch, 0, step, math.nan, rank)
    for rank in guards:
        stored = sorted((tmp_path / "incidents").glob(f"*_rank_{rank}.json"))
        assert [path.name for path in stored] == [f"step_{step:08d}_rank_{rank}.json" for step in range(MAX_STORED)]
        assert all(path.with_suffix(".pt").is_file() for path in stored)
    assert "the first ten are" in lines[-1]
