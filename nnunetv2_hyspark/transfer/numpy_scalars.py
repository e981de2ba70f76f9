"""Numpy numbers in nnU-Net's own checkpoints, read without numpy's unpickling code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

_CODES = frozenset({"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"})


class DtypeStandIn:
    """What a pickle says about a numpy dtype: its code and byte order. Nothing else of it is looked at."""

    def __init__(self, code: str = "", align: bool = False, copy: bool = False):
        if code not in _CODES:
            raise ValueError(f"numpy type {str(code)[:20]!r} is no plain number")
        self.code = code
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        """Takes the byte order from numpy's state tuple."""
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise ValueError("the state of a numpy type is damaged")
        self.order = state[1]


def scalar_stand_in(dtype: DtypeStandIn, data: bytes | str) -> int | float | bool:
    """A Python number from a numpy scalar's bytes. Raises ValueError where type and bytes do not fit."""
    if not isinstance(dtype, DtypeStandIn):
        raise ValueError("a numpy number has no type")
    raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
    kind = np.dtype(dtype.order + dtype.code)
    if len(raw) != kind.itemsize:
        raise ValueError("a numpy number has the wrong length")
    return np.frombuffer(raw, kind)[0].item()


def encode_stand_in(text: str, encoding: str) -> bytes:
    """``_codecs.encode(text, "latin1")``: how older pickle protocols write bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("bytes are written in an unknown way")
    return text.encode("latin1")


def allow_numpy_scalars() -> contextlib.AbstractContextManager[Any]:
    """Within it, ``torch.load(weights_only=True)`` turns numpy numbers into Python numbers.

    torch before 2.6 cannot substitute functions; there such files stay refused.
    """
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 6):
        return contextlib.nullcontext()
    stand_ins: list[Callable | tuple[Callable, str]] = [
        (scalar_stand_in, "numpy.core.multiarray.scalar"),
        (scalar_stand_in, "numpy._core.multiarray.scalar"),
        (DtypeStandIn, "numpy.dtype"),
        (encode_stand_in, "_codecs.encode"),
    ]
    return torch.serialization.safe_globals(stand_ins)
