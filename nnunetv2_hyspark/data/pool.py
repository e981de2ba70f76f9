"""Running one function over many items in worker processes, some of which may die."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import SimpleITK as sitk

Item = TypeVar("Item")
Result = TypeVar("Result")

QUEUED_PER_WORKER = 3


class WorkerDied(Exception):
    """The process that worked on one item ended without an answer, mostly for lack of memory."""


def run_parallel(
    function: Callable[[Item], Result], items: list[Item], processes: int
) -> Iterator[tuple[int, Result | WorkerDied]]:
    """Yield (index, result) for every item, in the order in which they finish.

    If a worker process dies, the items in work are tried again one at a time; the one that kills its worker again
    yields WorkerDied. With ``processes`` <= 1 everything runs in this process.

    Args:
        function: a picklable function of one item.
        items: picklable items.
        processes: number of worker processes.

    Raises:
        Exception: whatever ``function`` raises; the remaining items are then dropped.
    """
    if processes <= 1 or len(items) <= 1:
        for index, item in enumerate(items):
            yield index, function(item)
        return
    waiting = list(range(len(items)))[::-1]
    suspects: list[int] = []
    while waiting or suspects:
        alone = bool(suspects)
        queue = [suspects.pop()] if alone else waiting
        workers = 1 if alone else min(processes, len(queue))
        lost: list[int] = []
        with _executor(workers) as executor:
            running: dict[Future, int] = {}
            broken = False
            try:
                while (queue and not broken) or running:
                    while queue and not broken and len(running) < workers * QUEUED_PER_WORKER:
                        index = queue.pop()
                        try:
                            running[executor.submit(function, items[index])] = index
                        except BrokenProcessPool:
                            broken = True
                            queue.append(index)
                    if not running:
                        break
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        index = running.pop(future)
                        try:
                            yield index, future.result()
                        except BrokenProcessPool:
                            broken = True
                            lost.append(index)
            except BaseException:
                executor.shutdown(wait=True, cancel_futures=True)
                raise
        if alone:
            for index in lost:
                yield index, WorkerDied()
        else:
            suspects += lost


def _executor(workers: int) -> ProcessPoolExecutor:
    # forked copies of a process with ITK threads may hang
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _prepare_worker)


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
