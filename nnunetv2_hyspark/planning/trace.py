"""How much memory a computation needs on a GPU, found by running it on shapes alone.

Images, weights and all that follows from them are PyTorch's fake tensors: no arithmetic, no memory, any size in
seconds. Masks and index tables, on whose values shapes depend, are real. Every storage is counted from the moment it is
made until the last reference to it is gone, so activations kept for the backward pass, gradients and temporary tensors
are all in.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..linear import layer_by_layer

_INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_)


def _whole_numbers(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Boolean masks as the indices they stand for, whose number a fake tensor could not tell."""
    numbers: list[torch.Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        numbers += index.nonzero().unbind(1) if index is not None and is_mask else [index]
    return numbers


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations return, while they live.

    Works on real tensors too; those that existed before are not counted.

    Attributes:
        now, peak: bytes.
        largest_convolution: bytes of the input and the output of the largest convolution, forward or backward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.largest_convolution = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Runs the operation and counts what it returns."""
        if func.overloadpacket in _INDEXING:
            args = (args[0], _whole_numbers(args[1]), *args[2:])
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        for tensor in tensors:
            self._count(tensor.untyped_storage())
        if func.overloadpacket in (torch.ops.aten.convolution, torch.ops.aten.convolution_backward):
            inputs = [leaf for leaf in args[:2] if isinstance(leaf, torch.Tensor)]
            touched = sum(t.numel() * t.element_size() for t in [*inputs, *tensors])
            self.largest_convolution = max(self.largest_convolution, touched)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class _CudaPolicy(TorchFunctionMode):
    """CPU autocast with the operations that autocast on CUDA computes in float32 in that precision."""

    _FULL = (F.layer_norm, torch.layer_norm, torch.softmax, F.softmax, torch.Tensor.softmax, F.cross_entropy)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Runs a function, with its half-precision arguments in float32 if it is one of these."""
        if func in self._FULL:
            args = tuple(a.float() if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 else a for a in args)
        return func(*args, **(kwargs or {}))


@contextmanager
def precision(mixed: bool) -> Iterator[None]:
    """float32, or the precision of ``torch.autocast("cuda")`` for CPU tensors; bfloat16 stands for either half. Layers
    are computed as on GPUs."""
    if not mixed:
        with layer_by_layer():
            yield
        return
    with layer_by_layer(), _CudaPolicy(), torch.autocast("cpu", dtype=torch.bfloat16):
        yield


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one optimizer step.

    Attributes:
        peak: largest sum of living tensors, weights and gradients included, optimizer states not.
        largest_convolution: see :class:`LiveBytes`.
        weights: bytes of the weights.
    """

    peak: int
    largest_convolution: int
    weights: int


def trace_step(
    build: Callable[[], torch.nn.Module],
    image_shape: Sequence[int],
    step: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor],
) -> StepMemory:
    """Memory of a forward and backward pass on shapes alone.

    Args:
        build: makes the network.
        image_shape: ``(B, C, D, H, W)``.
        step: runs the network on an image under :func:`precision` and returns the loss.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.random.fork_rng(devices=[]):
        network = build().train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in network.modules():  # made for real first, because initialisation looks at values
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                    module._parameters[name] = torch.nn.Parameter(fake)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        image = torch.empty(*image_shape)
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    inputs = image.numel() * image.element_size()
    with LiveBytes() as live:
        step(network, image).backward()
    return StepMemory(live.peak + weights + inputs, live.largest_convolution, weights)
