"""Checkpoints that are whole or absent, and that hold plain data only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch


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
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as stream:
            torch.save(checkpoint, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:
        previous = "the previous one is untouched" if target.exists() else "there is no previous one"
        raise OSError(f"could not write checkpoint {target} ({error}); {previous}; free some space and rerun with --c.") from error
    finally:
        temporary.unlink(missing_ok=True)
