"""Integer geometry of strides, grids and patches, shared by masking, the sparse layout and the networks.

Axes are always in array order ``(D, H, W)``; sizes are in voxels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Size3 = tuple[int, int, int]


def as_size3(value: Iterable[int] | int, name: str = "size") -> Size3:
    """Returns ``value`` as three positive ints; a single int is repeated. Raises ValueError otherwise."""
    given = (value,) * 3 if isinstance(value, int) else tuple(value)
    sizes = tuple(int(v) for v in given)
    if len(sizes) != 3 or min(sizes) < 1 or sizes != given:
        raise ValueError(f"{name} is {value}; expected three positive whole numbers (D, H, W).")
    return sizes[0], sizes[1], sizes[2]


def multiply(a: Size3, b: Size3) -> Size3:
    """Element-wise product."""
    return a[0] * b[0], a[1] * b[1], a[2] * b[2]


def divide(a: Size3, b: Size3, what: str = "size") -> Size3:
    """Element-wise exact quotient ``a / b``. Raises ValueError where a rest remains."""
    if any(x % y for x, y in zip(a, b)):
        raise ValueError(f"{what} {a} is not divisible by {b}; make every axis a multiple of it.")
    return a[0] // b[0], a[1] // b[1], a[2] // b[2]


def volume(size: Sequence[int]) -> int:
    """Number of voxels in a box of this size."""
    product = 1
    for edge in size:
        product *= int(edge)
    return product


def cumulative_strides(strides: Sequence[Sequence[int]]) -> list[Size3]:
    """Total stride of every stage, from per-stage strides (finest first)."""
    total: Size3 = (1, 1, 1)
    totals = []
    for stride in strides:
        total = multiply(total, as_size3(stride, "stride"))
        totals.append(total)
    return totals


def block_shapes(strides: Sequence[Sequence[int]]) -> list[Size3]:
    """Edge lengths of one junction cell at every stage: the last total stride over each stage's total stride.

    For the paper's strides 1, 2, 2, 2, 2 these are 16, 8, 4, 2, 1 voxels per axis.
    """
    totals = cumulative_strides(strides)
    return [divide(totals[-1], total, "total stride") for total in totals]
