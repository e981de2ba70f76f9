"""What a run does when it goes on, is started again, or cannot write: nothing is mixed up, nothing is lost."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunetv2_hyspark.training import trainer as trainer_module
from nnunetv2_hyspark.training.checkpoints import BEST, FINAL, LATEST, checkpoints_in, progress_of
from nnunetv2_hyspark.transfer.report import LoadReport

SHORT = "finetuning.epochs=2,finetuning.warmup_epochs=0,finetuning.save_every=1,iterations_per_epoch=2"
FINETUNE = "HySparKFinetuneTrainer"
SCRATCH = "HySparKScratchTrainer"


def release(trainer) -> None:
    """As if its process had ended."""
    trainer.claimed.close()


def log_of(trainer) -> str:
    return Path(trainer.log_file).read_text()


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["network_weights"]


@pytest.fixture
def pretrained(make_trainer: Callable) -> str:
    """A pre-training checkpoint, written without training."""
    trainer = make_trainer("seed=5")
    trainer.initialize()
    trainer.folder.mkdir(parents=True, exist_ok=True)
    trainer.save_checkpoint(str(trainer.folder / FINAL))
    return str(trainer.folder / FINAL)


def test_another_number_of_heads_is_another_network(make_trainer: Callable) -> None:
    """No tensor has another shape, and the network computes something else."""
    six, two = (f"{SHORT},finetuning.epochs=1,features_per_stage=[4,8,24],head_width={width}" for width in (4, 12))
    trainer = make_trainer(six, trainer_name=SCRATCH)
    trainer.run_training()
    release(trainer)
    for options in ({"continue_training": True}, {"validate": True}):
        with pytest.raises(ValueError, match=r"another network \(its transformer has 6 attention heads"):
            make_trainer(two, trainer_name=SCRATCH, **options)
    other_fold = make_trainer(two, trainer_name=SCRATCH, fold=1)
    before = (trainer.folder.parent / "plans.json").read_bytes()
    with pytest.raises(ValueError, match=r"fold_0 with another network \(transformer_heads 6 there, 2 here"):
        other_fold.on_train_start()
    assert (trainer.folder.parent / "plans.json").read_bytes() == before
    same = make_trainer(six, trainer_name=SCRATCH, fold=1)
    same.on_train_start()
    release(same)


def test_val_best_of_a_run_that_had_nothing_to_go_on_from(make_trainer: Callable) -> None:
    trainer = make_trainer(SHORT, continue_training=True, trainer_name=SCRATCH)
    trainer.run_training()
    best = torch.load(trainer.folder / BEST, weights_only=True)
    best["network_weights"]["encoder.cnn.stem.weight"] += 1
    torch.save(best, trainer.folder / BEST)
    trainer.load_checkpoint(str(trainer.folder / BEST))
    found = trainer.network.state_dict()["encoder.cnn.stem.weight"]
    assert torch.equal(found, best["network_weights"]["encoder.cnn.stem.weight"])


def test_a_run_stopped_before_its_first_checkpoint_begins_from_the_same_weights(make_trainer, pretrained) -> None:
    first = make_trainer(SHORT, trainer_name=FINETUNE, weights=pretrained)
    first.on_train_start()
    release(first)
    again = make_trainer(SHORT, continue_training=True, trainer_name=FINETUNE)
    again.on_train_start()
    assert f"begins again from {pretrained}" in log_of(again) and "trains from scratch" not in log_of(again)
    stem = "encoder.cnn.stem.weight"
    assert torch.equal(again.network.state_dict()[stem], weights_in(Path(pretrained))[stem])
    release(again)
    os.rename(pretrained, f"{pretrained}.elsewhere")
    gone = make_trainer(SHORT, continue_training=True, trainer_name=FINETUNE)
    with pytest.raises(FileNotFoundError, match="that file is gone; start it again with -pretrained_weights"):
        gone.on_train_start()
    anew = make_trainer(SHORT, trainer_name=FINETUNE)
    anew.on_train_start()
    assert not (anew.folder / "load_report.json").exists(), "it would say that this run was pre-trained"
    release(anew)


def test_images_prepared_otherwise_than_before_are_said(make_trainer, pretrained, small_dataset, capsys) -> None:
    def load() -> str:
        capsys.readouterr()
        trainer = make_trainer(SHORT, trainer_name=FINETUNE, weights=pretrained)
        trainer.on_train_start()
        release(trainer)
        return capsys.readouterr().out

    said = "voxels had 1 x 1 x 1 mm in pre-training, they have 2 x 1 x 1 mm in this plan; `hyspark plan-finetune`"
    assert "in this plan" not in load()
    path = small_dataset / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 1.0, 1.0]
    path.write_text(json.dumps(plans))
    assert load().count(said) == 1


def test_a_run_that_goes_on_is_not_said_to_train_from_scratch(make_trainer: Callable, pretrained: str) -> None:
    first = make_trainer(SHORT, trainer_name=FINETUNE, weights=pretrained)
    first.on_train_start()
    first.on_epoch_start()
    first.save_checkpoint(str(first.folder / LATEST))
    release(first)
    again = make_trainer(SHORT, continue_training=True, trainer_name=FINETUNE)
    again.on_train_start()
    assert again.was_resumed and again.current_epoch == 0 and "trains from scratch" not in log_of(again)
    release(again)


@pytest.mark.parametrize("where", ["train_step", "validation_step"])
def test_a_signal_that_ends_the_workers_too_costs_no_progress(make_trainer, monkeypatch, where) -> None:
    """Schedulers signal every process; the loader then raises before the next step can look."""
    trainer = make_trainer(SHORT, trainer_name=SCRATCH)
    ordinary = getattr(trainer, where)

    def signalled(batch):
        if trainer.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            if where == "train_step":
                raise RuntimeError("One or more background workers are no longer alive.")
        return ordinary(batch)

    monkeypatch.setattr(trainer, where, signalled)
    with pytest.raises(SystemExit) as stopped:
        trainer.run_training()
    assert stopped.value.code == 143
    assert torch.load(trainer.folder / LATEST, weights_only=True)["current_epoch"] == 1
    assert "Run the same command with --c to go on" in log_of(trainer)


def test_a_signal_while_a_run_starts_writes_nothing(make_trainer: Callable, monkeypatch) -> None:
    """No step has been done, and what lies there may be another run's."""
    first = make_trainer(SHORT, trainer_name=SCRATCH)
    first.run_training()
    release(first)
    (first.folder / FINAL).rename(first.folder / LATEST)
    before = {path.name: path.read_bytes() for path in checkpoints_in(first.folder)}
    again = make_trainer(f"{SHORT},finetuning.epochs=4", continue_training=True, trainer_name=SCRATCH)

    def signalled():
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("One or more background workers are no longer alive.")

    monkeypatch.setattr(again, "get_dataloaders", signalled)
    with pytest.raises(SystemExit) as stopped:
        again.run_training()
    assert stopped.value.code == 143
    assert {path.name: path.read_bytes() for path in checkpoints_in(first.folder)} == before


def test_what_a_signal_saved_comes_before_the_best_epoch(make_trainer: Callable, monkeypatch) -> None:
    """Both say that as many epochs are done, but the latest one has steps of the next."""
    trainer = make_trainer(SHORT, trainer_name=SCRATCH)
    ordinary, steps = trainer.train_step, []

    def signalled(batch):
        steps.append(trainer.current_epoch)
        if steps.count(1) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return ordinary(batch)

    monkeypatch.setattr(trainer, "train_step", signalled)
    with pytest.raises(SystemExit):
        trainer.run_training()
    release(trainer)
    assert progress_of(trainer.folder / BEST) == (1, 0) and progress_of(trainer.folder / LATEST) == (1, 1)
    again = make_trainer(SHORT, continue_training=True, trainer_name=SCRATCH)
    assert again.resumed_from == LATEST and again.current_epoch == 1
    again.run_training()
    assert (again.folder / FINAL).is_file()


def test_a_refused_fold_leaves_its_own_earlier_run(make_trainer: Callable, pretrained: str) -> None:
    trained, other = (f"{SHORT},features_per_stage=[4,8,24],head_width={width}" for width in (4, 12))
    for fold in (0, 1):
        trainer = make_trainer(trained, trainer_name=SCRATCH, fold=fold)
        trainer.run_training()
        release(trainer)
    again = make_trainer(other, trainer_name=SCRATCH, fold=1)
    with pytest.raises(ValueError, match="fold_0 with another network"):
        again.write_load_report(LoadReport("somewhere"))
    assert FINAL in [path.name for path in checkpoints_in(trainer.folder)] and not again.weights_were_loaded


def test_an_error_without_a_signal_stays_an_error(make_trainer: Callable, monkeypatch) -> None:
    trainer = make_trainer(SHORT, trainer_name=SCRATCH)

    def broken(batch):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(trainer, "train_step", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.run_training()
    assert not checkpoints_in(trainer.folder)


def test_a_full_disk_does_not_end_fine_tuning(make_trainer: Callable, monkeypatch) -> None:
    trainer = make_trainer(f"{SHORT},finetuning.epochs=4,finetuning.save_every=50", trainer_name=SCRATCH)
    saved, ordinary = [], trainer_module.save_atomically

    def on_a_disk_that_is_full_for_a_while(checkpoint, filename):
        saved.append((Path(filename).name, trainer.current_epoch))
        if trainer.current_epoch == 0:
            raise OSError(f"could not write checkpoint {filename}")
        ordinary(checkpoint, filename)

    def cannot_draw(folder):
        raise OSError("no space left for progress.png")

    monkeypatch.setattr(trainer_module, "save_atomically", on_a_disk_that_is_full_for_a_while)
    trainer.initialize()
    monkeypatch.setattr(trainer, "draw_progress", cannot_draw)
    trainer.run_training()
    assert log_of(trainer).count("WARNING: progress.png was not written: no space left") == 4
    assert saved[0] == (BEST, 0) and (LATEST, 1) in saved and (BEST, 1) in saved
    assert [name for name, epoch in saved if epoch > 1].count(LATEST) == 0, "once written, it is as seldom as asked for"
    assert trainer.save_every == 50 and (trainer.folder / FINAL).is_file()
    assert "tries again after the next epoch" in log_of(trainer)


def test_a_final_checkpoint_that_cannot_be_written_is_an_error(make_trainer: Callable, monkeypatch) -> None:
    trainer = make_trainer(SHORT, trainer_name=SCRATCH)

    def full(checkpoint, filename):
        raise OSError("no space left")

    monkeypatch.setattr(trainer_module, "save_atomically", full)
    with pytest.raises(OSError, match="no space left"):
        trainer.run_training()


def test_a_network_of_two_stages_can_be_fine_tuned(make_trainer: Callable, small_dataset: Path) -> None:
    """Its decoder has one output, and nnU-Net's deep supervision would weigh it by 0 / 0."""
    file = small_dataset / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    kwargs = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    kwargs.update(strides=[[1, 1, 1], [2, 2, 2]], kernel_sizes=[[3, 3, 3]] * 2)
    file.write_text(json.dumps(plans))
    trainer = make_trainer(SHORT, trainer_name=SCRATCH)
    trainer.run_training()
    losses = trainer.logger.get_value("train_losses", step=None)
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert trainer.network(torch.zeros(1, 1, 16, 16, 16)).shape == (1, 2, 16, 16, 16)


def test_validating_a_finished_pre_training_again_leaves_its_checkpoint(make_trainer: Callable) -> None:
    """Fine-tuning plans remember its SHA-256."""
    first = make_trainer("pretraining.epochs=1")
    first.run_training()
    release(first)
    before = (first.folder / FINAL).read_bytes()
    again = make_trainer("pretraining.epochs=1", continue_training=True)
    again.run_training()
    assert (again.folder / FINAL).read_bytes() == before
    release(again)
    longer = make_trainer("pretraining.epochs=2", continue_training=True)
    longer.run_training()
    assert (longer.folder / FINAL).read_bytes() != before


def test_a_trial_without_checkpoints_leaves_those_that_are_there(make_trainer: Callable, pretrained: str) -> None:
    folder = Path(pretrained).parent
    trainer = make_trainer("pretraining.epochs=1")
    trainer.disable_checkpointing = True
    trainer.on_train_start()
    assert [path.name for path in checkpoints_in(folder)] == [FINAL] and not list(folder.glob("earlier_run_*"))


def test_half_written_files_go_when_a_run_goes_on(make_trainer: Callable) -> None:
    first = make_trainer("pretraining.epochs=1")
    first.run_training()
    release(first)
    part = first.folder / ".checkpoint_latest.pth.123.part"
    part.write_bytes(b"half")
    again = make_trainer("pretraining.epochs=2", continue_training=True)
    again.on_train_start()
    assert again.was_resumed and not part.exists()


def test_the_networks_of_trainers_can_be_copied(make_trainer: Callable, pretrained: str) -> None:
    for name in ("HySparKPretrainTrainer", FINETUNE):
        trainer = make_trainer(SHORT, trainer_name=name, fold=1)
        trainer.on_train_start()
        twin = copy.deepcopy(trainer.network)
        with torch.no_grad():
            next(twin.parameters()).add_(1)
        assert not torch.equal(next(twin.parameters()), next(trainer.network.parameters()))
        trainer.network.hyspark_load_pretrained(pretrained)
        assert trainer.weights_were_loaded
