"""Two trainings in one results folder at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnunetv2_hyspark.training import exclusive
from nnunetv2_hyspark.training.exclusive import LOCK, claim

HOLD = """
import sys
from pathlib import Path
from nnunetv2_hyspark.training.exclusive import claim
file = claim(Path(sys.argv[1]), print)
print("holds", flush=True)
sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """Another process that has claimed the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "holds\n"
    return process


def test_the_second_is_refused_until_the_first_is_gone_however_it_ends(tmp_path: Path) -> None:
    with hold(tmp_path) as other:
        with pytest.raises(RuntimeError, match=f"process {other.pid} on .* trains in .* already; two trainings"):
            claim(tmp_path, pytest.fail)
        other.kill()
        other.wait()
        file = claim(tmp_path, pytest.fail)
    assert file is not None and (tmp_path / LOCK).read_text().startswith(f"{os.getpid()} ")
    file.close()


def test_a_lock_of_another_machine_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    with hold(tmp_path) as other:
        monkeypatch.setattr(exclusive.socket, "gethostname", lambda: "elsewhere")
        assert claim(tmp_path, warnings.append) is None
        other.kill()
    assert [w.startswith(f"WARNING: process {other.pid} on ") for w in warnings] == [True]


def test_a_file_system_without_locks_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    assert claim(tmp_path, pytest.fail) is None


def test_a_training_is_refused_before_it_touches_anything(make_trainer, tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.folder.mkdir(parents=True, exist_ok=True)
    before = {path: path.read_bytes() for path in trainer.folder.rglob("*") if not path.name.startswith("training_log")}
    with hold(trainer.folder) as other:
        with pytest.raises(RuntimeError, match="trains in .* already"):
            trainer.run_training()
        other.kill()
    after = {path: path.read_bytes() for path in trainer.folder.rglob("*") if not path.name.startswith("training_log")}
    assert {path for path in after if path.name != LOCK} == set(before)
    trainer.run_training()
