"""The frozen phase of fine-tuning: nothing of the encoder is computed, clipped or updated, and then all of it is."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

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
