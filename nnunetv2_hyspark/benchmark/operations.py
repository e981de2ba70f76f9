"""Counted multiplications and counted bytes of what ran."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def forward_gmac(run: Callable[[], object]) -> float:
    """Giga multiply-adds of convolutions and matrix products in one call, counted from the shapes that really ran."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        run()
    return counter.get_total_flops() / 2e9


def counted_gb(run: Callable[[], object]) -> float:
    """Gigabytes that the operations of one call read and write, its backward pass included.

    Every operation counts all its input and output tensors in full, what it changes in place as read and as written;
    views and memory that is only reserved count nothing. This is an upper bound of these tensors' traffic to main
    memory, because caches are not modelled: an operation that finds its input there reads it for nothing. Work buffers
    inside an operation are not seen.
    """
    counter = _ByteCounter()
    with counter:
        run()
    return counter.bytes / 1e9


class _ByteCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.bytes += _moved_bytes(func, args, kwargs, result)
        return result


def _moved_bytes(func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> int:
    read, written = _tensors((args, kwargs)), _tensors(result)
    operation = func.name().partition("::")[2]
    if operation.startswith(("empty", "new_empty")):
        return 0
    if func._schema.is_mutable:
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                changed = _tensors(args[position] if position < len(args) else kwargs.get(argument.name))
                written += [tensor for tensor in changed if not any(tensor is other for other in written)]
    elif written and {_memory(tensor) for tensor in written} <= {_memory(tensor) for tensor in read}:
        return 0
    return sum(tensor.numel() * tensor.element_size() for tensor in (*read, *written))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
