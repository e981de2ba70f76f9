"""Peak memory of one training step."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable

import torch


def _peak_of(run: Callable[[], Callable[[], object]], connection) -> None:
    step = run()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    connection.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e9)


def peak_gb(make_step: Callable[[], Callable[[], object]], device: torch.device) -> float:
    """Peak memory of a step above what network and data already hold, in GB.

    Args:
        make_step: builds network and data and returns the step; must be picklable on the CPU, where it runs in a fresh
            process (rise of the largest resident set). On CUDA, the rise of PyTorch's allocated memory.
    """
    if device.type == "cuda":
        step = make_step()
        step()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e9
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
