"""The block path against the dense reference over crop sizes and batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..geometry import Size3
from .request import Request, forget_compiled, make_encoder, make_step
from .tables import summary
from .timing import interleave

COMPARED = ("blocks", "dense")


def sweep_points(request: Request, sizes: Sequence[Size3], batches: Sequence[int]) -> list[Request]:
    """Every crop size with every batch, sharing the request's seconds per table."""
    budget = request.budget / max(len(sizes) * len(batches), 1)
    return [replace(request, size=size, batch=batch, budget=budget) for size in sizes for batch in batches]


def sweep(points: Sequence[Request], ceilings: Mapping[str, float]) -> list[dict[str, Any]]:
    """Times the encoder, forward and backward, and a whole step at every point.

    Returns:
        Per point ``size``, ``batch`` and ``out_of_memory``, and unless a GPU's memory was too small for it
        ``encoder_forward_backward`` and ``step``: the variants' rows of
        :func:`nnunetv2_hyspark.benchmark.tables.summary`.
    """
    rows = []
    for point in points:
        row: dict[str, Any] = {"size": list(point.size), "batch": point.batch, "out_of_memory": False}
        try:
            for name, make in (
                ("encoder_forward_backward", partial(make_encoder, backward=True)), ("step", make_step)
            ):
                row[name] = _time(point, make, ceilings)
        except torch.cuda.OutOfMemoryError:
            row = {"size": list(point.size), "batch": point.batch, "out_of_memory": True}
        if point.device == "cuda":
            torch.cuda.empty_cache()
        rows.append(row)
    return rows


def _time(
    point: Request, make: Callable[[Request, str], Callable[[], object]], ceilings: Mapping[str, float]
) -> dict[str, Any]:
    forget_compiled()
    runs = {variant: make(point, variant) for variant in COMPARED}
    return summary(interleave(runs, point.repeats, point.budget, torch.device(point.device)), ceilings)
