"""Runs of the pre-training trainer: stopped and gone on with, started anew, with broken data and broken losses."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunetv2_hyspark.data import loader
from nnunetv2_hyspark.masking import upsample_mask
from nnunetv2_hyspark.sparse import backends
from nnunetv2_hyspark.sparse.convolution import submanifold_conv3d
from nnunetv2_hyspark.training import diagnosis
from nnunetv2_hyspark.training.checkpoints import BEST, FINAL, LATEST, checkpoints_in, kept_name, progress_of
from nnunetv2_hyspark.training.epoch import EpochSoFar
from nnunetv2_hyspark.training.reconstruction import reconstruct
from nnunetv2_hyspark.training.whole_image import load_pretrained_model
from nnunetv2_hyspark.transfer.reading import read_checkpoint

REPRODUCIBLE = ("train_losses", "val_losses", "gradient_norms", "lrs", "effective_rank", "background_crops")


def logged(trainer) -> dict[str, list[float]]:
    log = trainer.logger.local_logger.my_fantastic_logging
    return {key: log[key] for key in REPRODUCIBLE}


def stop_after(trainer, steps: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Sends this process a signal at the start of a step."""
    original = trainer.compute_loss
    calls = []

    def compute_loss(image, visible):
        calls.append(1)
        if len(calls) == steps:
            os.kill(os.getpid(), number)
        return original(image, visible)

    trainer.compute_loss = compute_loss


@pytest.mark.parametrize(
    ("number", "steps", "done", "settings"),
    # an epoch has 3 training and 2 validation steps; the 5th loss is in the first validation, the 7th in the next epoch
    [
        (signal.SIGTERM, 1, (0, 1), ""),
        (signal.SIGTERM, 5, (0, 3), ""),
        (signal.SIGTERM, 7, (1, 2), ""),
        (signal.SIGTERM, 7, (1, 2), "decoder=reconstruction"),
        (signal.SIGINT, 7, (1, 2), ""),
        (signal.SIGUSR1, 7, (1, 2), ""),
    ],
)
def test_stopped_and_resumed_is_bit_equal(make_trainer, tmp_path, number, steps, done, settings):
    whole = make_trainer(settings)
    whole.run_training()
    reference = read_checkpoint(whole.folder / FINAL)
    shutil.rmtree(tmp_path / "results")
    (tmp_path / "results").mkdir()

    first = make_trainer(settings)
    stop_after(first, steps, number)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as left:
        first.run_training()
    assert left.value.code == 128 + number
    assert signal.getsignal(number) == before
    second = make_trainer(settings, continue_training=True)
    assert (second.current_epoch, second.so_far.step) == done
    second.run_training()

    assert logged(second) == logged(whole)
    resumed = read_checkpoint(second.folder / FINAL)
    for name, tensor in reference["network_weights"].items():
        assert torch.equal(tensor, resumed["network_weights"][name]), name
    for index, state in reference["optimizer_state"]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, resumed["optimizer_state"]["state"][index][key])
    assert torch.equal(reference["random_state"]["torch"], resumed["random_state"]["torch"])


def test_changed_settings_are_said_when_a_run_goes_on(make_trainer):
    first = make_trainer()
    stop_after(first, 2)
    with pytest.raises(SystemExit):
        first.run_training()
    same = Path(make_trainer(continue_training=True).log_file).read_text()
    assert "other settings" not in same
    changed = make_trainer("pretraining.mask_ratio=0.5", continue_training=True)
    assert "pretraining.mask_ratio was 0.75, is 0.5" in Path(changed.log_file).read_text()


PAPER_S = "decoder=reconstruction"


@pytest.mark.parametrize("before, now, named", [
    (PAPER_S, "", "pretraining.decoder was reconstruction, is segmentation"),
    ("", PAPER_S, "pretraining.decoder was segmentation, is reconstruction"),
    (PAPER_S, f"{PAPER_S},skips=none", "pretraining.skips was concatenate, is none"),
    (PAPER_S, f"{PAPER_S},fuse_finest=false", "pretraining.fuse_finest was True, is False"),
])
def test_a_run_does_not_go_on_with_another_decoder(make_trainer, before, now, named):
    """Also where this run's network has nothing that the checkpoint lacks; the setting is named, not just a tensor."""
    first = make_trainer(before)
    stop_after(first, 2)
    with pytest.raises(SystemExit):
        first.run_training()
    files = {path: path.read_bytes() for path in first.folder.glob("*.pth")}
    with pytest.raises(ValueError, match=f"has another network .*{named}") as error:
        make_trainer(now, continue_training=True)
    assert "reconstruction." in str(error.value)
    assert {path: path.read_bytes() for path in first.folder.glob("*.pth")} == files
    assert make_trainer(before, continue_training=True).was_resumed


def test_a_run_that_names_no_decoder_had_the_paper_s(make_trainer):
    first = make_trainer(PAPER_S)
    stop_after(first, 2)
    with pytest.raises(SystemExit):
        first.run_training()
    checkpoint = read_checkpoint(first.folder / LATEST)
    del checkpoint["hyspark"]["settings"]["pretraining"]["decoder"]
    torch.save(checkpoint, first.folder / LATEST)
    with pytest.raises(ValueError, match="pretraining.decoder was reconstruction, is segmentation"):
        make_trainer(continue_training=True)
    log = Path(make_trainer(PAPER_S, continue_training=True).log_file).read_text()
    assert "other settings" not in log


def test_settings_of_the_optimizer_are_todays(make_trainer):
    first = make_trainer()
    stop_after(first, 2)
    with pytest.raises(SystemExit):
        first.run_training()
    changed = make_trainer("pretraining.weight_decay=0.2", continue_training=True)
    assert sorted(group["weight_decay"] for group in changed.optimizer.param_groups) == [0.0, 0.2]
    assert any("exp_avg" in state for state in changed.optimizer.state.values())


def test_random_state_is_restored(make_trainer):
    first = make_trainer()
    stop_after(first, 2)
    with pytest.raises(SystemExit):
        first.run_training()
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(99)
    np.random.seed(99)
    make_trainer(continue_training=True)
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])


def test_the_gradient_scaler_goes_on_too(make_trainer):
    first = make_trainer()
    first.grad_scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    stop_after(first, 7)  # the 7th loss is that of the fifth training step
    with pytest.raises(SystemExit):
        first.run_training()
    assert first.grad_scaler.get_scale() == 128
    second = make_trainer()
    second.continue_training = True
    second.grad_scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    second.load_checkpoint(second.folder / LATEST)
    assert second.grad_scaler.state_dict() == first.grad_scaler.state_dict()
    assert second.grad_scaler.get_scale() == 128
    second.run_training()
    assert second.grad_scaler.get_scale() == 512


def test_starting_anew_moves_the_earlier_run_aside(make_trainer):
    first = make_trainer()
    first.run_training()
    assert "earlier run" not in Path(first.log_file).read_text()
    (first.folder / "validation").mkdir()
    weights = (first.folder / FINAL).read_bytes()
    second = make_trainer("pretraining.seed=1")
    second.run_training()
    (earlier,) = second.folder.glob("earlier_run_*")
    assert (earlier / FINAL).read_bytes() == weights
    assert (earlier / "validation").is_dir()
    assert (second.folder / FINAL).read_bytes() != weights
    log = Path(second.log_file).read_text()
    assert f"they are now in {earlier}. To go on with a run instead, give --c." in log


def test_starting_anew_moves_everything_that_a_run_writes(make_trainer, tmp_path):
    first = make_trainer()
    first.run_training()
    source = tmp_path / "source.pth"
    shutil.copy(first.folder / FINAL, source)
    (first.folder / "tensorboard").mkdir()
    (first.folder / "load_report.json").write_text("of the first run")
    second = make_trainer("pretraining.seed=1")
    second.initialize()
    second.load_pretrained(str(source))
    second.run_training()
    (earlier,) = second.folder.glob("earlier_run_*")
    assert (earlier / "load_report.json").read_text() == "of the first run"
    assert (earlier / "tensorboard").is_dir() and not (second.folder / "tensorboard").exists()
    assert json.loads((second.folder / "load_report.json").read_text())["source"] == str(source)


def test_goes_on_from_the_furthest_checkpoint_not_from_an_old_final_one(make_trainer):
    make_trainer().run_training()
    longer = make_trainer("pretraining.epochs=6", continue_training=True)
    stop_after(longer, 7)
    with pytest.raises(SystemExit):
        longer.run_training()
    assert (longer.folder / FINAL).is_file()
    again = make_trainer("pretraining.epochs=6", continue_training=True)
    assert (again.current_epoch, again.so_far.step) == (4, 2)


def test_a_damaged_checkpoint_is_passed_over(make_trainer):
    first = make_trainer("save_minutes=0.000001")
    stop_after(first, 8)
    with pytest.raises(SystemExit):
        first.run_training()
    latest = first.folder / LATEST
    data = bytearray(latest.read_bytes())
    data[len(data) // 2] ^= 0xFF
    latest.write_bytes(bytes(data))
    second = make_trainer(continue_training=True)
    assert (second.current_epoch, second.so_far.step) == (1, 0), "checkpoint_best is from the end of epoch 0"
    assert LATEST in Path(second.log_file).read_text()
    for path in checkpoints_in(first.folder):
        path.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ValueError, match="can be read"):
        make_trainer(continue_training=True)


def test_policy(make_trainer):
    trainer = make_trainer("keep_every=2,pretraining.save_every=1")
    saved = []
    original = trainer.save_checkpoint
    trainer.save_checkpoint = lambda name: (saved.append(Path(name).name), original(name))
    trainer.run_training()
    assert saved.count(LATEST) == 2 and saved[-1] == FINAL and saved.count(kept_name(2)) == 1
    assert {p.name for p in checkpoints_in(trainer.folder)} == {BEST, FINAL, kept_name(2)}
    best = min(trainer.logger.get_value("val_losses", step=None))
    assert read_checkpoint(trainer.folder / BEST)["_best_ema"] == best


def test_disabled_checkpointing_deletes_nothing(make_trainer):
    first = make_trainer()
    stop_after(first, 4)
    with pytest.raises(SystemExit):
        first.run_training()
    second = make_trainer(continue_training=True)
    second.disable_checkpointing = True
    before = (second.folder / LATEST).read_bytes()
    second.run_training()
    assert (second.folder / LATEST).read_bytes() == before
    assert [p.name for p in checkpoints_in(second.folder)] == [LATEST]


def test_a_full_disk_is_survived_until_the_end(make_trainer, monkeypatch):
    trainer = make_trainer("pretraining.save_every=1")
    original = torch.save
    attempts = []

    def full(checkpoint, stream, *args, **kwargs):
        attempts.append(1)
        if 2 <= len(attempts) <= 4:
            raise OSError(28, "No space left on device")
        return original(checkpoint, stream, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    trainer.run_training()
    text = Path(trainer.log_file).read_text()
    assert "No space left on device" in text and "the previous one is untouched" in text
    assert (trainer.folder / FINAL).is_file()
    assert not list(trainer.folder.glob(".*.part"))


def break_losses(trainer, steps: set[int], value: float = math.nan) -> None:
    original = trainer.compute_loss
    trainer.compute_loss = lambda image, visible: original(image, visible) * (
        value if trainer.network.training and trainer.step in steps else 1.0
    )


def test_a_step_without_finite_loss_is_stored_and_skipped(make_trainer):
    trainer = make_trainer()
    break_losses(trainer, {4})
    trainer.run_training()
    record = json.loads((trainer.folder / "incidents" / "step_00000004_rank_0.json").read_text())
    stored = torch.load(trainer.folder / "incidents" / "step_00000004_rank_0.pt", weights_only=True)
    batch = trainer.dataloader_train.dataset[4]
    assert torch.equal(stored["data"], batch["data"]) and torch.equal(stored["visible"], batch["visible"])
    assert [s["case"] for s in record["samples"]] == batch["keys"]
    assert [s["mask_seed"] for s in record["samples"]] == batch["mask_seeds"]
    assert trainer.logger.get_value("skipped_steps", step=None) == [0, 1, 0]
    assert all(map(math.isfinite, trainer.logger.get_value("train_losses", step=None)))
    assert all(torch.isfinite(p).all() for p in trainer.network.parameters())


def test_half_precision_tells_overflow_from_a_loss_that_is_not_finite(make_trainer):
    trainer = make_trainer()
    trainer.on_train_start()
    # gradients scaled this much overflow, which the scaler mends by itself
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    break_losses(trainer, {0}, 1e4)
    break_losses(trainer, {1})
    trainer.network.train()
    before = [p.clone() for p in trainer.network.parameters()]
    trainer.train_step(next(trainer.dataloader_train))
    assert trainer.guard.in_a_row == 0 and trainer.grad_scaler.get_scale() < 2e38
    assert all(torch.equal(p, b) for p, b in zip(trainer.network.parameters(), before))
    scale = trainer.grad_scaler.get_scale()
    trainer.train_step(next(trainer.dataloader_train))
    assert trainer.guard.in_a_row == 1 and trainer.grad_scaler.get_scale() == scale / 2
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    trainer.train_step(next(trainer.dataloader_train))
    assert trainer.guard.in_a_row == 0
    assert not all(torch.equal(p, b) for p, b in zip(trainer.network.parameters(), before))


def test_half_precision_that_overflows_at_any_scale_is_not_the_scales_fault(make_trainer):
    trainer = make_trainer("max_bad_steps=2")
    trainer.on_train_start()
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    next(trainer.network.parameters()).register_hook(lambda gradient: gradient * math.inf)
    trainer.network.train()
    counts = []
    for _ in range(3):
        trainer.train_step(next(trainer.dataloader_train))
        counts.append(trainer.guard.in_a_row)
    assert counts == [0, 1, 2] and trainer.guard.exhausted
    assert trainer.so_far.step == 3 and trainer.so_far.losses == []


def test_validation_is_computed_in_parts_too(make_trainer):
    losses, sizes = {}, {}
    for accumulate in (1, 2):
        trainer = make_trainer(f"accumulate={accumulate}")
        trainer.on_train_start()
        original, seen = trainer.compute_loss, []
        trainer.compute_loss = lambda image, visible, f=original, s=seen: (s.append(len(image)), f(image, visible))[1]
        trainer.network.eval()
        trainer.health_is_due = True
        with torch.no_grad():
            losses[accumulate] = trainer.validation_step(next(trainer.dataloader_val))["loss"]
        sizes[accumulate] = seen
        trainer.on_train_end()
    assert len(sizes[1]) == 1 and len(sizes[2]) == 2 and max(sizes[2]) < sizes[1][0]
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)


def test_mask_ratios_vary_in_training_and_are_fixed_in_validation(make_trainer):
    trainer = make_trainer("mask_ratio_low=0.25")
    trainer.on_train_start()
    counts = [set(next(loader)["visible"].flatten(1).sum(1).tolist()) for loader in [trainer.dataloader_train] * 6]
    fixed = [set(next(trainer.dataloader_val)["visible"].flatten(1).sum(1).tolist()) for _ in range(2)]
    assert len(set.union(*counts)) > 2
    assert len(set.union(*fixed)) == 1
    trainer.on_train_end()


def test_the_lowest_mask_ratio_may_not_be_above_the_highest(make_trainer):
    with pytest.raises(ValueError, match="mask_ratio_low is 0.9, above mask_ratio 0.75"):
        make_trainer("mask_ratio_low=0.9").initialize()


def test_processes_have_the_same_number_of_parts(make_trainer):
    trainer = make_trainer("accumulate=2")
    trainer.world_size, trainer.configuration_manager.configuration["batch_size"] = 2, 3
    for share in (1, 2):  # three crops over two processes
        batch = {"data": torch.zeros(share, 1, 4, 4, 4), "visible": torch.zeros(share, 2, 2, 2, dtype=torch.bool)}
        assert [len(crops) for crops, _ in trainer.in_parts(batch)] == [share]


def test_too_many_steps_without_finite_loss_end_the_run_with_good_weights(make_trainer):
    trainer = make_trainer("max_bad_steps=3")
    break_losses(trainer, set(range(4, 100)), math.inf)
    with pytest.raises(RuntimeError, match="3 steps in a row.*step 6 in epoch 2"):
        trainer.run_training()
    checkpoint = read_checkpoint(trainer.folder / LATEST)
    assert all(torch.isfinite(t).all() for t in checkpoint["network_weights"].values() if t.is_floating_point())


def test_weights_that_are_not_finite_overwrite_nothing(make_trainer):
    trainer = make_trainer()
    trainer.run_training()
    before = (trainer.folder / FINAL).read_bytes()
    with torch.no_grad():
        next(trainer.network.parameters()).fill_(math.nan)
    with pytest.raises(RuntimeError, match="NaN or infinite.*last good"):
        trainer.save_checkpoint(str(trainer.folder / FINAL))
    assert (trainer.folder / FINAL).read_bytes() == before


def test_the_time_of_an_epoch_that_goes_on_is_all_of_it(make_trainer, capsys):
    trainer = make_trainer("epochs=1")
    trainer.so_far = EpochSoFar(step=1, losses=[1.0], gradient_norms=[1.0], crops=2, own_crops=2, seconds=5000.0)
    trainer.run_training()
    (seconds,) = re.findall(r"Epoch time: (\d+)\.", capsys.readouterr().out)
    assert 5000 <= int(seconds) < 5100


def test_a_batch_that_was_fitted_for_other_settings_is_said(make_trainer, small_dataset, capsys):
    path = small_dataset / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    plans["configurations"]["3d_fullres"]["hyspark"] = {
        "pretraining": {"batch_size": 2}, "memory": {"pretraining": {"decoder": "reconstruction", "bottom_up": True}}
    }
    path.write_text(json.dumps(plans))
    said = (
        "WARNING: the plan's batch of 2 crops fits its memory target with decoder=reconstruction; this run has "
        "decoder=segmentation and may need more, or leave some; plan again with nnUNet_hyspark=decoder=segmentation, "
        "or set a batch_size."
    )
    spelled = said.replace("decoder=segmentation", "decoder=segmentation,bottom_up=false")
    spelled = spelled.replace("decoder=reconstruction", "decoder=reconstruction,bottom_up=true")
    make_trainer("bottom_up=false")
    assert spelled in capsys.readouterr().out
    for setting, expected in (("", 1), ("decoder=reconstruction", 0), ("batch_size=4", 0)):
        make_trainer(setting)
        assert capsys.readouterr().out.count(said) == expected, setting


def test_a_broken_case_stops_by_default_and_is_named(make_trainer, small_dataset):
    folder = small_dataset / "nnUNetPlans_3d_fullres"
    trainer = make_trainer()
    train, _ = trainer.do_split()
    for name in train:
        (folder / f"{name}.b2nd").write_bytes((folder / f"{name}.b2nd").read_bytes()[:900])
    with pytest.raises(ValueError, match=r"case_\d\d.*on_broken_case=skip"):
        trainer.run_training()


def test_what_was_learned_before_the_data_vanished_is_saved(make_trainer, small_dataset):
    trainer = make_trainer()
    original = trainer.compute_loss

    def compute_loss(image, visible):
        if trainer.network.training and trainer.step == 4:
            for path in (small_dataset / "nnUNetPlans_3d_fullres").glob("*.b2nd"):
                path.unlink()
        return original(image, visible)

    trainer.compute_loss = compute_loss
    with pytest.raises(ValueError, match="has vanished"):
        trainer.run_training()
    assert progress_of(trainer.folder / LATEST) == (1, 2)


def test_what_was_learned_before_a_validation_without_data_is_saved(make_trainer, small_dataset):
    trainer = make_trainer()
    original = trainer.on_validation_epoch_start

    def on_validation_epoch_start():
        original()
        if trainer.current_epoch == 1:
            for path in (small_dataset / "nnUNetPlans_3d_fullres").glob("*.b2nd"):
                path.unlink()

    trainer.on_validation_epoch_start = on_validation_epoch_start
    with pytest.raises(ValueError, match="has vanished"):
        trainer.run_training()
    assert progress_of(trainer.folder / LATEST) == (1, 3)


def test_a_broken_and_a_vanished_case_can_be_skipped(make_trainer, small_dataset):
    folder = small_dataset / "nnUNetPlans_3d_fullres"
    trainer = make_trainer("on_broken_case=skip,iterations_per_epoch=12")
    train, _ = trainer.do_split()
    (folder / f"{train[0]}.b2nd").write_bytes(b"")
    (folder / f"{train[1]}.b2nd").unlink()
    trainer.run_training()
    text = Path(trainer.log_file).read_text()
    assert train[0] in text and train[1] in text and "another case is used" in text


def test_accumulation_does_not_change_the_result(make_trainer):
    def gradients(settings: str) -> torch.Tensor:
        trainer = make_trainer(f"batch_size=6,{settings}")
        trainer.on_train_start()
        trainer.network.double()
        batch = next(trainer.dataloader_train)
        batch["data"] = batch["data"].double()
        trainer.train_step(batch)
        return torch.cat([p.grad.flatten() for p in trainer.network.parameters()])

    at_once = gradients("accumulate=1")
    for parts in (2, 4, 100):
        assert torch.allclose(gradients(f"accumulate={parts}"), at_once, rtol=1e-9, atol=1e-12)


def test_everything_that_is_watched_is_logged(make_trainer):
    seen = []

    class Listener:
        def log(self, key, value, step):
            seen.append((key, step))

        def update_config(self, config): ...

        def log_summary(self, key, value): ...

    trainer = make_trainer("preview_every=1,preview_cases=1,probe_dataset=997,probe_every=2,probe_cases=1", draw=True)
    trainer.logger.loggers.append(Listener())
    trainer.run_training()
    log = trainer.logger.local_logger.my_fantastic_logging
    for key in ("train_losses", "val_losses", "lrs", "weight_decays", "gradient_norms", "crops_per_second",
                "waiting_for_data", "peak_memory_gb", "effective_rank", "reconstruction_deviation"):
        assert len(log[key]) == 3 and np.isfinite(log[key]).all(), key
        assert {(key, epoch) for epoch in range(3)} <= set(seen)
    assert len(log["probe_dice"]) == 3 and np.isfinite(log["probe_dice"]).all()
    assert (trainer.folder / "progress.png").stat().st_size > 10_000
    assert len(list((trainer.folder / "previews").glob("*/epoch_*.png"))) == 3
    assert len(list((trainer.folder / "previews").glob("*_over_time.png"))) == 1
    text = Path(trainer.log_file).read_text()
    for words in ("Current learning rate", "of the steps clipped, 0 skipped, weight decay 0.05", "crops/s", "waiting",
                  "GB at most, 0% of the crops background only", "effective rank", "deviation of the prediction",
                  "linear probe: Dice", "to go"):
        assert words in text, words


def test_throughput_is_a_plain_number_in_the_log(make_trainer):
    trainer = make_trainer("pretraining.epochs=1")
    measured = trainer.so_far.means
    trainer.on_train_start()
    trainer.so_far.means = lambda clip: {**measured(clip), "crops_per_second": 12345.678}
    trainer.run_epoch()
    assert "12345.68 crops/s" in Path(trainer.log_file).read_text()
    trainer.on_train_end()


def test_signs_of_trouble_reach_the_log_once(make_trainer, monkeypatch):
    monkeypatch.setattr(diagnosis, "WINDOW", 2)
    monkeypatch.setattr(loader, "BACKGROUND_DEVIATION", 1e9)
    trainer = make_trainer()
    trainer.run_training()
    text = Path(trainer.log_file).read_text()
    sign = (
        "SIGN OF TROUBLE: 100% of the crops hold background only; make the data set with hyspark prepare, whose mask "
        "steers crops to the body, or raise foreground_fraction."
    )
    assert text.count(sign) == 1


def test_watching_changes_nothing(make_trainer):
    quiet = make_trainer()
    quiet.run_training()
    watched = make_trainer("preview_every=1,probe_dataset=997,probe_every=1,probe_cases=1")
    watched.run_training()
    assert logged(quiet) == logged(watched)


def test_tensorboard_is_missed_in_a_sentence(make_trainer, monkeypatch):
    import builtins

    original = builtins.__import__

    def without(name, *args, **kwargs):
        if "tensorboard" in name and not name.startswith("nnunetv2_hyspark"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    trainer = make_trainer("tensorboard=true")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RuntimeError, match="TensorBoard is not installed; run: pip install"):
        trainer.run_training()


def test_tensorboard_gets_settings_and_numbers(make_trainer, monkeypatch):
    scalars, texts, folders = [], {}, []

    class SummaryWriter:
        def __init__(self, folder):
            folders.append(folder)

        def add_text(self, name, text):
            texts[name] = text

        def add_scalar(self, name, value, step):
            scalars.append((name, value, step))

        def flush(self): ...

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    trainer = make_trainer("tensorboard=true,mask_ratio=0.5")
    trainer.run_training()
    assert folders == [str(trainer.folder / "tensorboard")]
    assert '"mask_ratio": 0.5' in texts["settings"] and '"patch_size"' in texts["configuration"]
    losses = trainer.logger.get_value("train_losses", step=None)
    assert [(value, step) for name, value, step in scalars if name == "train_losses"] == list(zip(losses, range(3)))
    assert {"lrs", "weight_decays", "gradient_norms", "crops_per_second"} <= {name for name, _, _ in scalars}
    assert not any(name.endswith("_timestamps") for name, _, _ in scalars)


def test_weights_and_biases_get_settings_and_numbers(make_trainer, monkeypatch):
    class Run:
        step = 0

        def __init__(self):
            self.config, self.summary, self.logged = {}, {}, []

        def log(self, values, step):
            self.logged.append((values, step))

    runs = []
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **_: (runs.append(Run()), runs[-1])[1]
    monkeypatch.setattr("nnunetv2.training.logging.nnunet_logger.wandb", wandb)
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    trainer = make_trainer("mask_ratio=0.5")
    trainer.run_training()
    (run,) = runs
    configuration = run.config["plans"]["configurations"]["3d_fullres"]
    assert configuration["hyspark"]["pretraining"]["mask_ratio"] == 0.5
    for key in ("train_losses", "val_losses", "lrs", "effective_rank"):
        values = trainer.logger.get_value(key, step=None)
        assert [entry for entry in run.logged if key in entry[0]] == [({key: v}, e) for e, v in enumerate(values)]


def test_a_checkpoint_tells_the_decoder_s_width_as_a_number(make_trainer):
    """So that a later version with another default reads it as it was."""
    trainer = make_trainer("decoder=reconstruction")
    trainer.run_training()
    checkpoint = read_checkpoint(trainer.folder / FINAL)
    width = trainer.model.reconstruction.projections[0].out_channels
    stored = checkpoint["init_args"]["plans"]["configurations"]["3d_fullres"]["hyspark"]["pretraining"]
    assert checkpoint["hyspark"]["settings"]["pretraining"]["decoder_width"] == stored["decoder_width"] == width > 0


@pytest.mark.parametrize("load_decoder", [True, False])
def test_a_segmentation_decoder_goes_from_pretraining_to_finetuning(make_trainer, load_decoder):
    first = make_trainer()
    first.run_training()
    trained = dict(first.model.reconstruction.decoder.named_parameters())
    stored = read_checkpoint(first.folder / FINAL)["network_weights"]
    assert trained and all(torch.equal(stored[f"decoder.{name}"], trained[name]) for name in trained)
    assert [name for name in stored if name.startswith("decoder.seg_layers.")]
    second = make_trainer(f"load_decoder={json.dumps(load_decoder)}", trainer_name="HySparKFinetuneTrainer")
    second.initialize()
    second.load_pretrained(str(first.folder / FINAL))
    decoder = dict(second.network.decoder.named_parameters())
    equal = {name: torch.equal(decoder[name], trained[name]) for name in trained if trained[name].ndim > 1}
    assert equal and set(equal.values()) == {load_decoder}


def test_intensities_as_targets_from_training_to_pictures(make_trainer):
    """The network says the image's own values, in the loss, in the summary and where its checkpoint is looked at."""
    trainer = make_trainer("target=intensity")
    trainer.run_training()
    trainer.perform_actual_validation()
    units = json.loads((trainer.folder / "validation" / "summary.json").read_text())["units"]
    assert units["loss"] == "mean squared error on masked cells, preprocessed intensities"
    image = torch.randn(2, 1, *trainer.patch_size, generator=torch.Generator().manual_seed(0)) + 5
    model = load_pretrained_model(trainer.folder / FINAL, torch.device("cpu")).network
    visible = model.draw_mask(2, trainer.patch_size, 0.5, torch.Generator().manual_seed(0))
    hidden = ~upsample_mask(visible, model.encoder.junction_stride).expand_as(image)
    with torch.no_grad():
        prediction = model(image, visible)
        trainer.model.eval()
        loss = trainer.compute_loss(image, visible)
        one = reconstruct(model, image[0].numpy(), 0.5, 3, torch.device("cpu"))
        cells = tuple(slice(0, None, edge) for edge in model.encoder.junction_stride)
        alone = model(image[:1], torch.from_numpy(one.visible[cells])[None])
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(prediction[hidden], image[hidden]))
    expected = torch.where(torch.from_numpy(one.visible), image[0], alone[0])
    torch.testing.assert_close(torch.from_numpy(one.restored), expected)


def test_a_probe_data_set_that_is_not_there_ends_the_run_at_its_start(make_trainer):
    with pytest.raises(ValueError, match="probe_dataset is 996, but there is no such data set"):
        make_trainer("probe_dataset=996").run_training()


def test_validation_and_resume_after_the_end(make_trainer):
    first = make_trainer()
    first.run_training()
    first.perform_actual_validation()
    again = make_trainer(continue_training=True)
    again.run_training()
    again.perform_actual_validation()
    summary = json.loads((again.folder / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 2
    assert logged(first) == logged(again)


def test_a_backend_that_does_not_run_here_is_said_and_replaced(make_trainer, monkeypatch):
    """Compared with the reference at the start of every training, on the machine where it is to run.

    What Triton does is decided by the first import of its kernels in a process, which may have been another test's; the
    real one is tried in a process of its own (``tests/sparse/test_backends.py``).
    """

    def load_none(name: str) -> None:
        raise RuntimeError(f"no driver for {name}")

    monkeypatch.setattr(backends, "load_backend", load_none)
    trainer = make_trainer("backend=triton")
    trainer.initialize()
    log = Path(trainer.log_file).read_text()
    assert "WARNING: backend triton is not used on cpu, PyTorch's convolutions are: it failed (RuntimeError: no" in log
    assert trainer.model.layout.keywords["convolve"] is submanifold_conv3d
