"""Checkpoints that are whole or absent, that hold plain data only, and that no new run overwrites."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

LATEST = "checkpoint_latest.pth"
BEST = "checkpoint_best.pth"
FINAL = "checkpoint_final.pth"

_PARTIAL = ".part"


def plain(value: Any) -> Any:
    """Copies nested containers with numpy values turned into Python numbers, strings and lists.

    What is left loads with ``torch.load(weights_only=True)``. Tensors and torch devices pass (devices as text).
    """
    if isinstance(value, Mapping):
        return {plain(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(v) for v in value) if type(value) in (list, tuple) else [plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return value.item()
    return value


def save_atomically(checkpoint: Mapping[str, Any], filename: str | os.PathLike[str]) -> None:
    """Writes a checkpoint next to its name and renames it, so that a kill or a full disk leaves the old one whole.

    Raises:
        OSError: if writing fails; the message names the file and says that the previous one is untouched.
    """
    target = Path(filename)
    temporary = target.with_name(f".{target.name}.{os.getpid()}{_PARTIAL}")
    try:
        with open(temporary, "wb") as stream:
            torch.save(checkpoint, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except (OSError, RuntimeError) as error:
        previous = "the previous one is untouched" if target.exists() else "there is no previous one"
        raise OSError(
            f"could not write checkpoint {target} ({' '.join(str(error).split())}); {previous}; free some space and "
            f"rerun with --c."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes a rename last through a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems have no fsync for folders
        pass
    finally:
        os.close(descriptor)


def remove_partial_files(folder: str | os.PathLike[str]) -> None:
    """Deletes what killed runs left half written."""
    for path in Path(folder).glob(f".checkpoint_*{_PARTIAL}"):
        path.unlink(missing_ok=True)


def checkpoints_in(folder: str | os.PathLike[str]) -> list[Path]:
    """All checkpoints of a run's folder."""
    return sorted(Path(folder).glob("checkpoint_*.pth"))


def kept_name(epoch: int) -> str:
    """File name of a checkpoint that is kept for good after so many epochs."""
    return f"checkpoint_epoch_{epoch:06d}.pth"


def progress_of(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """How far the run was when it wrote a checkpoint: whole epochs, and steps of the next one.

    Returns:
        None if the file is damaged or no checkpoint. Weights are not read.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return int(checkpoint["current_epoch"]), int((checkpoint.get("epoch_so_far") or {}).get("step", 0))
    except Exception:  # a damaged file can raise nearly anything, and here each of it means the same
        return None


def most_advanced(folder: str | os.PathLike[str], besides: Iterable[Path] = ()) -> Path | None:
    """The checkpoint of a folder from which a run goes on: the furthest one.

    A finished run's final one wins a tie, then the best one, because only that knows its own score: the latest one is
    written before it.

    nnU-Net would take ``checkpoint_final.pth`` before all others, even where a run that was prolonged has got further.

    Args:
        folder: of a run.
        besides: files that turned out to be damaged.
    """
    excluded = set(besides)
    found = [(progress_of(path), path) for path in checkpoints_in(folder) if path not in excluded]
    usable = [(progress, path.name == FINAL, path.name == BEST, path) for progress, path in found if progress]
    return max(usable)[-1] if usable else None


def set_aside(folder: str | os.PathLike[str], names: Iterable[str], now: datetime) -> Path | None:
    """Moves what an earlier run left in a folder to a dated folder inside it.

    Args:
        folder: of the run that starts anew.
        names: files and folders besides checkpoints that go along.
        now: for the new folder's name.

    Returns:
        Where the earlier run lies now; None if there was no checkpoint.
    """
    folder = Path(folder)
    checkpoints = checkpoints_in(folder)
    if not checkpoints:
        return None
    base = folder / f"earlier_run_{now:%Y_%m_%d_%H_%M_%S}"
    target, number = base, 1
    while target.exists():
        number += 1
        target = base.with_name(f"{base.name}_{number}")
    target.mkdir()
    for path in [*(folder / name for name in names), *checkpoints]:
        if path.exists():
            path.rename(target / path.name)
    return target
