"""Reading checkpoint files that may come from anywhere, without running anything that is in them."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch


def read_checkpoint(filename: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a checkpoint file as plain data.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, damaged, not a checkpoint, or would need code to be executed.
    """
    path = Path(filename)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}; give the path of a .pth file.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; the run that wrote it was probably killed, so use another checkpoint.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path} cannot be read as plain data ({reason}); files that need code to be executed are refused, so "
            f"convert it where it was made: torch.save({{'network_weights': state_dict}}, file)."
        ) from None
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, KeyError, ValueError, TypeError, AttributeError,
            IndexError, UnicodeDecodeError, MemoryError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged or no checkpoint ({reason}); use another copy of it.") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}; expected a checkpoint, which is a dictionary.")
    return checkpoint


def network_weights(checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint of ours or of nnU-Net, without the prefixes of DDP and torch.compile.

    Raises:
        ValueError: if there are none.
    """
    weights = checkpoint.get("network_weights")
    if not isinstance(weights, dict) or not weights:
        raise ValueError(
            f"{path} has no 'network_weights' (found: {', '.join(sorted(map(str, checkpoint))[:8])}); "
            f"expected a checkpoint that nnU-Net or HySparK wrote."
        )
    cleaned = {}
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path} holds {name!r}: {type(tensor).__name__} among its weights; expected named tensors.")
        while name.startswith(("module.", "_orig_mod.")):
            name = name.split(".", 1)[1]
        cleaned[name] = tensor
    return cleaned
