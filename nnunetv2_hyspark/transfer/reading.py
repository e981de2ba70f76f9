"""Reading checkpoint files that may come from anywhere, without running anything that is in them."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .archive import check_archive, printable
from .description import check_format
from .numpy_scalars import allow_numpy_scalars

ENCODER = "encoder."
_WRAPPERS = ("network_weights", "module", "state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


def read_plain(filename: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a checkpoint file of any format version as plain data: tensors, numbers, strings, lists, dicts.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, damaged, not a checkpoint, or would need code to be executed.
    """
    path = Path(filename)
    check_archive(path)
    try:
        with allow_numpy_scalars(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on odd contents, which are checked here anyway
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a crafted file can make the reader raise anything; nothing of it has been used yet
        reason = printable(" ".join(str(error).split()) or type(error).__name__)
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted or "Unsupported" in reason:
            what = f"it asks for {printable(wanted.group(1), 80)}" if wanted else reason
            raise ValueError(
                f"{path} cannot be read as plain data ({what}); files that need code to be executed are refused, so "
                f"convert it where it was made: torch.save({{'network_weights': state_dict}}, file)."
            ) from None
        raise ValueError(f"{path} is damaged or no checkpoint ({reason}); use another copy of it.") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}; expected a checkpoint, which is a dictionary.")
    return checkpoint


def read_checkpoint(filename: str | os.PathLike[str]) -> dict[str, Any]:
    """:func:`read_plain` for use: a checkpoint that a newer version of this package wrote is refused (ValueError)."""
    checkpoint = read_plain(filename)
    check_format(checkpoint, filename)
    return checkpoint


def find_weights(
    checkpoint: Mapping[str, Any], path: str | os.PathLike[str]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The named tensors of a checkpoint, wherever they are.

    Looks at ``network_weights`` (ours and nnU-Net's), then at what others use (``module``, ``state_dict``, ``model``),
    then at the file itself; prefixes of DDP and torch.compile are removed.

    Returns:
        The weights, and what else lies among them (the official release keeps a ``config`` there).

    Raises:
        ValueError: if there are none, or one of them is no ordinary tensor that the file really holds.
    """
    candidate: Any = checkpoint
    for _ in range(3):
        inner = [candidate[key] for key in _WRAPPERS if isinstance(candidate.get(key), Mapping)]
        if not inner:
            break
        candidate = inner[0]
    weights: dict[str, torch.Tensor] = {}
    others: dict[str, Any] = {}
    for key, value in candidate.items():
        if not isinstance(value, torch.Tensor):
            others[str(key)] = value
            continue
        if not isinstance(key, str):
            raise ValueError(f"{path} holds a tensor under {type(key).__name__} instead of a name; use another file.")
        name = key
        while name.startswith(_PREFIXES):
            name = name.split(".", 1)[1]
        if name in weights:
            raise ValueError(f"{path} holds the weights {printable(name, 80)} twice; use another file.")
        _check_tensor(name, value, path)
        weights[name] = value
    if not weights:
        found = ", ".join(sorted(printable(str(key), 40) for key in checkpoint)[:8]) or "nothing"
        raise ValueError(
            f"{path} has no weights (found: {found}); expected 'network_weights' as in a checkpoint that nnU-Net or "
            f"HySparK wrote."
        )
    return weights, others


def network_weights(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The weights alone; see :func:`find_weights`. Here nothing else may lie among them (ValueError)."""
    weights, others = find_weights(checkpoint, path)
    if others and isinstance(checkpoint.get("network_weights"), Mapping):
        name, value = next(iter(others.items()))
        raise ValueError(
            f"{path} holds {printable(name, 80)}: {type(value).__name__} among its weights; expected named tensors."
        )
    return weights


def image_weight(weights: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The weight of the encoder's convolution that meets the image, ``(out, channels, k0, k1, k2)``: its first in 3D.

    Args:
        weights: under our names, in the order of the network's modules.

    Returns:
        None if there is no such weight.
    """
    return next((tensor for name, tensor in weights.items() if name.startswith(ENCODER) and tensor.ndim == 5), None)


def _check_tensor(name: str, tensor: torch.Tensor, path: str | os.PathLike[str]) -> None:
    shown = printable(name, 80)
    ordinary = (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and not tensor.is_complex()
    )
    if not ordinary:
        raise ValueError(f"{path} holds {shown} as no ordinary tensor; expected dense real numbers.")
    # A view with stride zero can have any shape: it costs nothing until somebody computes with it.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"{path} gives {shown} the shape {tuple(tensor.shape)}, more values than the file holds; use another copy."
        )
