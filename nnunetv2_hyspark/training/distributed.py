"""Several processes: which device a process uses, which samples it makes, and how its network is wrapped."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch._dynamo
from torch import distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


def world() -> tuple[int, int]:
    """``(rank, number of processes)``; ``(0, 1)`` where there is one process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def process_device(asked: torch.device) -> torch.device:
    """The device of this process: the GPU of its rank on this machine, else what was asked for.

    torchrun tells both ranks; nnU-Net's ``-num_gpus`` tells none, but then there is only one machine. A local rank
    alone is something that a scheduler left behind.
    """
    if asked.type != "cuda":
        return asked
    launched = "RANK" in os.environ and "LOCAL_RANK" in os.environ
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) if launched else world()[0])


@contextmanager
def process_group(device: torch.device, timeout: timedelta) -> Iterator[None]:
    """Joins the processes that torchrun started: NCCL for GPUs, gloo for CPUs.

    An error leaves without waiting for the others: torchrun ends them. Networks that were distributed must be out of
    scope when the context ends.

    Args:
        device: of this process.
        timeout: how long processes wait for each other before they give up.
    """
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    # torchrun keeps one store for all restarts, and the addresses of processes that have died would still be in it
    fresh = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", store=fresh, rank=rank, world_size=size, timeout=timeout
    )
    yield
    # what holds the group has to go first: gloo's threads may still have tensors to give back, and a thread that asks
    # for the interpreter while it is being shut down ends the process with SIGABRT
    gc.collect()
    dist.destroy_process_group()


def distribute(network: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Wraps a network for training by several processes; batch norms get statistics of the global batch on GPUs."""
    if device.type == "cuda":
        # torch.compile would cut the graph by gradient buckets; some versions cannot, for custom autograd functions
        torch._dynamo.config.optimize_ddp = False
        return DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(network), device_ids=[device.index])
    return DistributedDataParallel(network)


def split_batch(global_batch: int, world_size: int, rank: int) -> range:
    """Which samples of a global batch a process makes. Raises ValueError if there are fewer samples than processes."""
    if global_batch < world_size:
        raise ValueError(
            f"the batch size is {global_batch} for {world_size} processes; set batch_size to at least {world_size}."
        )
    bounds = np.linspace(0, global_batch, world_size + 1).round().astype(int)
    return range(int(bounds[rank]), int(bounds[rank + 1]))


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process; every process must ask."""
    if world()[1] == 1:
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())


def only_on_first(action: Callable[[], None]) -> None:
    """Runs something on rank 0 while the others wait."""
    if world()[0] == 0:
        action()
    if world()[1] > 1:
        dist.barrier()


def gather(value: T) -> list[T]:
    """Every process's value, in the order of ranks, in every process."""
    size = world()[1]
    if size == 1:
        return [value]
    values: list[T] = [value] * size
    dist.all_gather_object(values, value)
    return values
