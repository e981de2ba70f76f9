"""The frozen phase of fine-tuning: nothing of the encoder is computed, clipped or updated, and then all of it is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_hyspark.training.checkpoints import LATEST, progress_of
from nnunetv2_hyspark.training.trainer import unwrap

SETTINGS = (
    "finetuning.epochs=4,finetuning.warmup_epochs=0,finetuning.frozen_epochs=2,iterations_per_epoch=2,"
    "val_iterations_per_epoch=1,finetuning.seed=0"
)


@pytest.fixture
def make(make_trainer):
    """Makes a trainer without pre-trained weights, ready for its first epoch."""

    def make(settings: str = SETTINGS, continue_training: bool = False):
        trainer = make_trainer(settings, continue_training, trainer_name="HySparKScratchTrainer")
        trainer.on_train_start()
        return trainer

    return make


@pytest.fixture
def one_process_group() -> Iterator[None]:
    """DistributedDataParallel in this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=30))
    yield
    dist.destroy_process_group()


def parts(trainer) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Copies of the encoder's weights and of all others."""
    weights = {name: p.detach().clone() for name, p in unwrap(trainer.network).named_parameters()}
    encoder = {name: p for name, p in weights.items() if name.startswith("encoder.")}
    return encoder, {name: p for name, p in weights.items() if name not in encoder}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def train_epoch(trainer, steps: int = 2) -> None:
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    for _ in range(steps):
        trainer.train_step(next(trainer.dataloader_train))


def check_phases(trainer, frozen: int, free: int) -> None:
    """Runs epochs and looks at weights, gradients and moments."""
    encoder = set(unwrap(trainer.network).encoder.parameters())
    for _ in range(frozen):
        before = parts(trainer)
        train_epoch(trainer)
        after = parts(trainer)
        assert same(before[0], after[0]) and not same(before[1], after[1])
        assert all(parameter.grad is None for parameter in encoder)
        assert encoder.isdisjoint(trainer.optimizer.state)
        trainer.current_epoch += 1
    for _ in range(free):
        before = parts(trainer)
        train_epoch(trainer)
        after = parts(trainer)
        assert all(parameter.grad is not None for parameter in encoder)
        assert not any(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
        trainer.current_epoch += 1


def break_gradients(trainer, steps: set[int]) -> None:
    """Makes the gradients of some steps, counted from 0 over the run, NaN."""
    calls = iter(range(1000))
    original = trainer.loss
    trainer.loss = lambda output, target: original(output, target) * (
        math.nan if trainer.network.training and next(calls) in steps else 1.0
    )


def test_a_step_without_finite_gradients_is_skipped(make):
    trainer = make()
    trainer.current_epoch = 2  # nothing is frozen
    break_gradients(trainer, {1})
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    outputs, weights = [], []
    for _ in range(3):
        outputs.append(trainer.train_step(next(trainer.dataloader_train)))
        weights.append(parts(trainer)[0])
    assert same(weights[0], weights[1]) and not same(weights[1], weights[2])
    assert [output["skipped"] for output in outputs] == [False, True, False]
    trainer.logger.local_logger.my_fantastic_logging["train_losses"] = [1.0, 1.0]
    trainer.on_train_epoch_end(outputs)
    mean = (float(outputs[0]["loss"]) + float(outputs[2]["loss"])) / 2
    assert trainer.logger.get_value("train_losses", step=-1) == pytest.approx(mean)
    text = Path(trainer.log_file).read_text()
    assert "the gradients of step 1 of this epoch are not finite (loss nan, cases case_" in text
    assert "1 of 3 steps were skipped" in text


def test_too_many_steps_without_finite_gradients_end_the_run(make):
    trainer = make(f"{SETTINGS},finetuning.max_bad_steps=2")
    trainer.current_epoch = 2
    break_gradients(trainer, {0, 2, 3})
    with pytest.raises(RuntimeError, match="not finite in 2 steps in a row, the last one step 3 of epoch 2"):
        train_epoch(trainer, steps=5)
    assert progress_of(trainer.folder / LATEST) == (2, 4), "repeated from weights that are four steps further"


def test_overflow_of_half_precision_does_not_count(make):
    trainer = make()
    trainer.current_epoch = 2
    # gradients scaled this much overflow, which the scaler mends by itself
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    original = trainer.loss
    trainer.loss = lambda output, target: original(output, target) * 1e4
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    before = parts(trainer)[0]
    assert not trainer.train_step(next(trainer.dataloader_train))["skipped"]
    assert trainer.bad_steps_in_a_row == 0 and trainer.grad_scaler.get_scale() < 2e38
    assert same(before, parts(trainer)[0])


def test_frozen_and_then_not(make):
    trainer = make()
    train_epoch(trainer, 0)
    assert not any(p.requires_grad for p in trainer.network.encoder.parameters())
    assert all(p.requires_grad for p in trainer.network.decoder.parameters())
    check_phases(trainer, 2, 1)
    assert all(p.requires_grad for p in trainer.network.parameters())


def test_a_linear_probe_is_frozen_for_good(make):
    check_phases(make(f"{SETTINGS},finetuning.frozen_epochs=0,finetuning.encoder_lr_scale=0"), 3, 0)


def test_several_processes_do_the_same(make, one_process_group):
    trainer = make()
    assert isinstance(trainer.network, DistributedDataParallel)
    check_phases(trainer, 2, 2)


@pytest.mark.parametrize("done", [1, 2, 3])
def test_goes_on_from_any_epoch(make, done: int):
    """Stopped in the frozen phase, at its end, and after it."""
    trainer = make()
    check_phases(trainer, min(done, 2), max(done - 2, 0))
    train_epoch(trainer, 1)  # the epoch in which it stops is repeated
    trainer.save_checkpoint(str(trainer.folder / "checkpoint_latest.pth"))
    resumed = make(continue_training=True)
    assert resumed.current_epoch == done and same(parts(trainer)[0], parts(resumed)[0])
    check_phases(resumed, max(2 - done, 0), 1)


@pytest.mark.slow
def test_a_compiled_network_learns_of_the_change(make):
    trainer = make()
    trainer.network = torch.compile(trainer.network, backend="aot_eager")
    check_phases(trainer, 1, 0)
    trainer.current_epoch = 2
    check_phases(trainer, 0, 1)
