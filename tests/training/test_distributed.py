"""Shares of a batch, devices of processes, and the arguments of the torchrun entry."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_hyspark import train
from nnunetv2_hyspark.training.distributed import gather, process_device, split_batch, world


@given(st.integers(1, 64), st.integers(0, 200))
def test_shares_cover_the_batch_once_and_evenly(world_size: int, more: int) -> None:
    batch = world_size + more
    shares = [split_batch(batch, world_size, rank) for rank in range(world_size)]
    assert [p for share in shares for p in share] == list(range(batch))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_fewer_samples_than_processes() -> None:
    with pytest.raises(ValueError, match="batch size is 2 for 3 processes; set batch_size to at least 3"):
        split_batch(2, 3, 0)


def test_the_device_is_that_of_the_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("RANK", "11")
    assert process_device(torch.device("cuda")) == torch.device("cuda", 3)
    assert process_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.delenv("RANK")
    assert process_device(torch.device("cuda")) == torch.device("cuda", 0), "left behind by a scheduler"
    monkeypatch.delenv("LOCAL_RANK")
    assert process_device(torch.device("cuda")) == torch.device("cuda", 0)


def test_one_process() -> None:
    assert world() == (0, 1) and gather("x") == ["x"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--c", "--val"], "give one"),
        (["--c", "-pretrained_weights", "x.pth"], "has its weights already"),
        (["--val_best", "--disable_checkpointing"], "leave one out"),
        (["-fold", ""], "unrecognized"),
    ],
)
def test_wrong_arguments_end_with_status_2(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        train.main(["1", "3d_fullres", "0", *arguments])
    assert left.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "enabled"), [(None, "1"), ("0", "1"), ("1", "0"), ("9", "0")])
def test_only_the_first_process_opens_a_run_of_weights_and_biases(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, enabled: str
) -> None:
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    seen = []
    monkeypatch.setattr(train, "train_and_validate", lambda *_: seen.append(os.environ["nnUNet_wandb_enabled"]))
    train.train(train.parser().parse_args(["1", "3d_fullres", "0", "-device", "cpu"]))
    assert seen == [enabled]


def test_fold() -> None:
    parse = train.parser().parse_args
    assert train.check(parse(["1", "3d_fullres", "3"])) == 3
    assert train.check(parse(["1", "3d_fullres", "all"])) == "all"
    with pytest.raises(ValueError, match="whole number"):
        train.check(parse(["1", "3d_fullres", "x"]))


def test_arguments_are_nnunets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every argument of nnUNetv2_train but -num_gpus is known here."""
    import inspect
    import re

    from nnunetv2.run import run_training

    theirs = set(re.findall(r"add_argument\('(-[\w-]+)'", inspect.getsource(run_training.run_training_entry)))
    ours = {option for action in train.parser()._actions for option in action.option_strings}
    assert theirs - ours == {"-num_gpus"}
