"""Files of checkpoints: whole or absent, found, moved aside."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunetv2_hyspark.training.checkpoints import (
    BEST,
    FINAL,
    LATEST,
    checkpoints_in,
    most_advanced,
    plain,
    progress_of,
    remove_partial_files,
    save_atomically,
    set_aside,
)

resource = pytest.importorskip("resource", reason="file size limits need a POSIX system")


def checkpoint(epoch: int, step: int | None = None) -> dict:
    return {"current_epoch": epoch, "epoch_so_far": None if step is None else {"step": step}, "w": torch.zeros(1000)}


def test_plain_values_load_without_running_code(tmp_path: Path) -> None:
    value = {np.int64(3): (np.float32(0.5), [np.array([1, 2])]), "tensor": torch.ones(2)}
    save_atomically(plain(value), tmp_path / "a.pth")
    loaded = torch.load(tmp_path / "a.pth", weights_only=True)
    assert loaded[3] == (0.5, [[1, 2]]) and torch.equal(loaded["tensor"], torch.ones(2))


def test_a_disk_that_fills_up_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / LATEST
    save_atomically(checkpoint(1), path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="the previous one is untouched; free some space"):
            save_atomically({**checkpoint(2), "w": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert progress_of(path) == (1, 0)
    assert list(tmp_path.iterdir()) == [path]


def test_without_an_old_file_the_message_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="there is no previous one"):
        save_atomically(checkpoint(1), tmp_path / "missing" / LATEST)


def test_the_furthest_checkpoint_is_found(tmp_path: Path) -> None:
    assert most_advanced(tmp_path) is None
    for name, epoch, step in ((FINAL, 3, None), (LATEST, 3, 7), (BEST, 2, None)):
        save_atomically(checkpoint(epoch, step), tmp_path / name)
    assert most_advanced(tmp_path) == tmp_path / LATEST
    assert most_advanced(tmp_path, [tmp_path / LATEST]) == tmp_path / FINAL
    save_atomically(checkpoint(3), tmp_path / LATEST)
    assert most_advanced(tmp_path) == tmp_path / FINAL, "a tie"
    save_atomically(checkpoint(4), tmp_path / LATEST)
    save_atomically(checkpoint(4), tmp_path / BEST)
    assert most_advanced(tmp_path) == tmp_path / BEST, "the latest one does not know its score"


@pytest.mark.parametrize("content", [b"", b"nothing", b"PK\x03\x04", None])
def test_damaged_files_have_no_progress(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / LATEST
    save_atomically(checkpoint(1), path)
    path.write_bytes(path.read_bytes()[:700] if content is None else content)
    assert progress_of(path) is None and most_advanced(tmp_path) is None


def test_partial_files_of_killed_runs_are_removed(tmp_path: Path) -> None:
    (tmp_path / f".{LATEST}.123.part").write_bytes(b"half")
    save_atomically(checkpoint(1), tmp_path / LATEST)
    remove_partial_files(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [LATEST]


def test_an_earlier_run_is_moved_aside_once_per_run(tmp_path: Path) -> None:
    now = datetime(2024, 1, 2, 3, 4, 5)
    assert set_aside(tmp_path, ["validation"], now) is None
    for expected in ("earlier_run_2024_01_02_03_04_05", "earlier_run_2024_01_02_03_04_05_2"):
        (tmp_path / "validation").mkdir()
        save_atomically(checkpoint(1), tmp_path / FINAL)
        (tmp_path / "training_log.txt").touch()
        moved = set_aside(tmp_path, ["validation", "progress.png"], now)
        assert moved == tmp_path / expected
        assert sorted(p.name for p in moved.iterdir()) == [FINAL, "validation"]
        assert checkpoints_in(tmp_path) == [] and (tmp_path / "training_log.txt").is_file()
