"""Linear layers by oneDNN on CPUs.

PyTorch's matrix product is MKL's there, which reaches half of oneDNN's speed on processors that are not Intel's: it
does not use their AVX-512 units. A linear layer is a convolution with a kernel of one, and convolutions are oneDNN's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn
from torch.nn import functional as F

# with one thread PyTorch leaves convolutions with a kernel of one to oneDNN from so many images on
IMAGES = 16


_BY_PYTORCH: ContextVar[bool] = ContextVar("layer_by_layer", default=False)


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """Computes by PyTorch's layers alone, as on GPUs, whose memory is counted on the CPU."""
    token = _BY_PYTORCH.set(True)
    try:
        yield
    finally:
        _BY_PYTORCH.reset(token)


def runs_on_onednn(x: torch.Tensor) -> bool:
    """Whether oneDNN can serve for an input: on CPUs, in float32, without autocast, compiler or tracer, and not inside
    :func:`layer_by_layer`."""
    return (
        not torch.compiler.is_compiling()  # first, because compilers cannot look into the rest
        and not torch.jit.is_tracing()  # TorchScript cannot store functions written in Python
        and not _BY_PYTORCH.get()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )


def images_for(x: torch.Tensor) -> int:
    """As how many images oneDNN takes the rows of a linear layer's input; 0 if it does not."""
    if not runs_on_onednn(x):
        return 0
    if x.numel() // x.shape[-1] % IMAGES == 0:
        return IMAGES
    return 1 if torch.get_num_threads() > 1 else 0


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``torch.nn.functional.linear``.

    Args:
        x: ``(..., C)``.
        weight: ``(O, C)``.
        bias: ``(O,)`` or None.

    Returns:
        ``(..., O)``.
    """
    images = images_for(x)
    if not images:
        return F.linear(x, weight, bias)
    maps = x.reshape(images, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    return F.conv2d(maps, weight[:, :, None, None], bias).permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


class Linear(nn.Linear):
    """``torch.nn.Linear`` by :func:`linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., C)`` to ``(..., O)``."""
        return linear(x, self.weight, self.bias)


def use_linear(network: nn.Module) -> None:
    """Replaces the ``torch.nn.Linear`` inside a network of a library by :class:`Linear`; the parameters stay."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                replacement = Linear(child.in_features, child.out_features, child.bias is not None, device="meta")
                replacement.weight, replacement.bias = child.weight, child.bias
                setattr(module, name, replacement)
