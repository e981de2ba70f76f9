"""A sparse map that carries its layout through a network that knows nothing of masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ..geometry import Size3, as_size3
from .layout import SparseLayout


class SparseMap:
    """Values in a layout's form, which convolutions, norms, poolings and activations of PyTorch take for a tensor.

    PyTorch asks every argument that has ``__torch_function__`` how to compute (its protocol for tensor-like objects),
    so ``torch.nn`` modules run unchanged, and the mask stays an explicit part of the data.

    Args:
        values: in the layout's form.
        layout: where they lie.
    """

    def __init__(self, values: torch.Tensor, layout: SparseLayout):
        self.values = values
        self.layout = layout

    def dim(self) -> int:
        """Number of axes."""
        return self.values.dim()

    def size(self, axis: int | None = None) -> Any:
        """Shape of the values, or one edge of it."""
        return self.values.size() if axis is None else self.values.size(axis)

    def __add__(self, other: SparseMap) -> SparseMap:
        return SparseMap(self.values + other.values, self.layout)

    def __iadd__(self, other: SparseMap) -> SparseMap:
        return self + other

    @classmethod
    def __torch_function__(
        cls,
        function: Callable,
        _types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> SparseMap:
        """Computes a function of PyTorch on the values. Raises TypeError for one that may mix masked voxels in."""
        kwargs = dict(kwargs or {})
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, SparseMap):
            raise TypeError(f"{_name(function)} got its sparse map as another argument than the first one.")
        if function in _MIXING:
            return SparseMap(_MIXING[function](x, *args[1:], **kwargs), x.layout)
        if function in _VOXELWISE:
            rest = [a.values if isinstance(a, SparseMap) else a for a in args[1:]]
            return SparseMap(function(x.values, *rest, **kwargs), x.layout)
        raise TypeError(
            f"{_name(function)} is not known for sparse maps; known are 3D convolutions, instance norms, poolings "
            f"whose window is their stride, and activations."
        )


def _name(function: Callable) -> str:
    return getattr(function, "__name__", str(function))


def _triple(value: Any) -> tuple[int, int, int]:
    values = (value,) * 3 if isinstance(value, int) else tuple(value)
    return values[0], values[1], values[2]


def _conv3d(x: SparseMap, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> torch.Tensor:
    kernel = as_size3(weight.shape[2:])
    same = tuple(k // 2 for k in kernel)
    if _triple(padding) != same or _triple(dilation) != (1, 1, 1) or any(k % 2 == 0 for k in kernel):
        raise ValueError(
            f"a convolution has kernel {kernel}, padding {padding} and dilation {dilation}; sparse maps need odd "
            f"kernels, padding {same} and dilation 1."
        )
    return x.layout.conv3d(x.values, weight, bias, _triple(stride), groups)


def _instance_norm(
    x: SparseMap,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
) -> torch.Tensor:
    if not use_input_stats:
        raise ValueError("an instance norm uses running statistics; sparse maps need track_running_stats=False.")
    return x.layout.instance_norm(x.values, weight, bias, eps)


def _window(kernel_size: Any, stride: Any, padding: Any) -> Size3:
    window = _triple(kernel_size)
    if (_triple(stride) if stride not in (None, []) else window) != window or _triple(padding) != (0, 0, 0):
        raise ValueError(
            f"a pooling has window {window}, stride {stride} and padding {padding}; sparse maps need the window to be "
            f"the stride, and no padding."
        )
    return window


def _max_pool3d(x: SparseMap, kernel_size, stride=None, padding=0, *_options, **_more) -> torch.Tensor:
    return x.layout.max_pool3d(x.values, _window(kernel_size, stride, padding))


def _avg_pool3d(x: SparseMap, kernel_size, stride=None, padding=0, *_options, **_more) -> torch.Tensor:
    return F.avg_pool3d(x.values, _window(kernel_size, stride, padding))


_MIXING: dict[Callable, Callable[..., torch.Tensor]] = {
    F.conv3d: _conv3d,
    F.instance_norm: _instance_norm,
    F.max_pool3d: _max_pool3d,
    F.avg_pool3d: _avg_pool3d,
}
_VOXELWISE = (F.relu, F.leaky_relu, F.gelu, F.silu, F.elu, F.mish, F.dropout, torch.relu, torch.add)
