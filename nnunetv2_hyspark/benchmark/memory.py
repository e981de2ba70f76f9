"""Peak memory of one training step."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable
from contextlib import suppress

import torch

from ..heap import give_back_freed_memory, keep_freed_memory


def _status_gb(key: str) -> float:
    """An entry of Linux's process status in GB. ``ru_maxrss`` will not do: a child inherits its parent's peak."""
    with open("/proc/self/status", encoding="utf-8") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith(f"{key}:")) * 1024 / 1e9


def _peak_of(run: Callable[[], Callable[[], object]], connection) -> None:
    keep_freed_memory()
    step = run()
    # what was needed to make it is neither there for the step nor part of its peak
    gc.collect()
    give_back_freed_memory()
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as stream:
        stream.write("5")  # the peak of the resident set begins anew
    before = _status_gb("VmRSS")
    step()
    connection.send(_status_gb("VmHWM") - before)


def peak_gb(make_step: Callable[[], Callable[[], object]], device: torch.device) -> float:
    """Peak memory of a step above what network and data already hold, in GB.

    Args:
        make_step: builds network and data and returns the step; must be picklable on the CPU, where it runs in a fresh
            process (rise of the largest resident set; Linux only). On CUDA, the rise of PyTorch's allocated memory.
    """
    if device.type == "cuda":
        step = make_step()
        before = torch.cuda.memory_allocated(device)
        step()  # tries algorithms, with workspaces that no later step has
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e9
    if not os.path.exists("/proc/self/status"):
        return float("nan")
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak_of, args=(make_step, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError("the process that measures memory died; is there enough memory for this step?") from None
    finally:
        process.join()
