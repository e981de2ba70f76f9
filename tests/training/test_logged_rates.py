"""Freezing and rates of fine-tuning, as the log says them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

COMMON = "finetuning.epochs=4,finetuning.warmup_epochs=0,finetuning.learning_rate=1e-3"


@pytest.fixture
def make(make_trainer):
    """Makes a trainer without pre-trained weights and its log: ``make("finetuning.layer_decay=0.5")``."""

    def make(settings: str):
        trainer = make_trainer(f"{COMMON},{settings}", trainer_name="HySparKScratchTrainer")
        trainer.on_train_start()
        return trainer

    return make


def groups(trainer) -> dict[str, float]:
    """Peak rate of every group of parameters, from the log; their numbers of parameters add up to the network's."""
    rows = re.findall(r"^(\S+): ([\d,]+) parameters, peak rate (\S+), weight decay \S+ *$", read(trainer), re.MULTILINE)
    total = sum(int(count.replace(",", "")) for _, count, _ in rows)
    assert total == sum(parameter.numel() for parameter in trainer.network.parameters())
    return {name: float(rate) for name, _, rate in rows}


def rates(trainer, epoch: int) -> dict[str, float]:
    """Rates at the start of an epoch, from the log."""
    trainer.current_epoch = epoch
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    line = re.findall(r"Current learning rate: (.*)$", read(trainer), re.MULTILINE)[-1]
    return {name: float(rate) for name, rate in (part.split() for part in line.split(", "))}


def read(trainer) -> str:
    return Path(trainer.log_file).read_text()


def test_frozen_encoder(make) -> None:
    trainer = make("finetuning.frozen_epochs=2")
    for epoch in (0, 1):
        shown = rates(trainer, epoch)
        assert shown["encoder"] == 0 and shown["decoder"] > 0
    shown = rates(trainer, 2)
    assert shown["encoder"] == shown["decoder"] > 0


def test_linear_probe(make) -> None:
    trainer = make("finetuning.encoder_lr_scale=0")
    assert groups(trainer) == {"encoder": 0, "decoder": 1e-3}
    assert rates(trainer, 3)["encoder"] == 0 < rates(trainer, 3)["decoder"]


def test_separate_rates(make) -> None:
    trainer = make("finetuning.encoder_lr_scale=0.1")
    assert groups(trainer) == pytest.approx({"encoder": 1e-4, "decoder": 1e-3})
    shown = rates(trainer, 1)
    assert shown["encoder"] == pytest.approx(0.1 * shown["decoder"], rel=0.01)


def test_layer_wise_decay(make) -> None:
    """Every stage has a rate of its own, half that of the stage below it."""
    trainer = make("finetuning.layer_decay=0.5")
    expected = {"decoder": 1.0, **{f"encoder-{depth}": 0.5**depth for depth in range(4)}}
    assert groups(trainer) == pytest.approx({name: 1e-3 * scale for name, scale in expected.items()})
    shown = rates(trainer, 1)
    assert shown == pytest.approx({name: shown["decoder"] * scale for name, scale in expected.items()}, rel=0.01)
