"""How many threads a process on CPUs takes."""

from __future__ import annotations

import os

import torch


def allowed_threads() -> int | None:
    """What ``OMP_NUM_THREADS`` says (the first number of a list), else how many processors this process may run on.

    None where neither is known: a variable that is no positive number is left to OpenMP, and not every system has
    affinities.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked:
        return int(asked) if asked.isdecimal() and int(asked) > 0 else None
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def keep_to_allowed_threads() -> int:
    """Has PyTorch take no more threads than it may; returns how many it takes.

    nnU-Net takes as many as the machine has processors, whatever ``OMP_NUM_THREADS`` says and however few of them a
    job of a cluster was given; then threads wait for each other's turn.
    """
    allowed = allowed_threads()
    if allowed is not None and allowed < torch.get_num_threads():
        torch.set_num_threads(allowed)
    return torch.get_num_threads()
