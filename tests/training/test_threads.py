"""Threads on CPUs: no more than the user or the cluster allows."""

import os
import subprocess
import sys

import pytest
import torch

from nnunetv2_hyspark.training.threads import allowed_threads, keep_to_allowed_threads


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "value, expected", [("3", 3), ("4,2", 4), (" 2 ", 2), ("0", None), ("many", None), ("-1", None)]
)
def test_the_variable_is_read(monkeypatch, value, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert allowed_threads() == expected


@pytest.mark.parametrize("value", [None, ""])
def test_without_it_processors_of_this_process_count(monkeypatch, value):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 7}, raising=False)
    assert allowed_threads() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert allowed_threads() is None


@pytest.mark.parametrize("taken, allowed, expected", [(4, "2", 2), (2, "4", 2), (3, "3", 3), (3, "none", 3)])
def test_threads_are_only_ever_fewer(monkeypatch, taken, allowed, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", allowed)
    torch.set_num_threads(taken)
    assert keep_to_allowed_threads() == expected == torch.get_num_threads()


def test_a_trainer_takes_back_what_nnunet_took(make_trainer, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(5)  # as nnU-Net's command does on a machine with five processors
    make_trainer()
    assert torch.get_num_threads() == 2
    assert "Threads: 2" in [line.strip() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinities")
def test_a_process_on_one_processor_takes_one_thread():
    code = (
        "import os, torch; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); torch.set_num_threads(4); "
        "from nnunetv2_hyspark.training.threads import keep_to_allowed_threads; print(keep_to_allowed_threads())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.split() == ["1"]
