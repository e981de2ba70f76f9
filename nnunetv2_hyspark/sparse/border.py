"""The zero-padded convolution of a map that holds the same vector everywhere.

Its result is the same vector everywhere too, but for voxels near the border. So it is known from as many voxels per
axis as the kernel has, the *response*: its middle entry holds inside the map, the others in a layer each at the border.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch.nn import functional as F

from ..geometry import Size3, as_size3


def border_response(values: torch.Tensor, weight: torch.Tensor, size: Size3) -> torch.Tensor:
    """The response of a constant map.

    Args:
        values: what the map holds, ``(M,)``.
        weight: ``(O, M, k0, k1, k2)``, every k odd.
        size: voxels of the map per axis.

    Returns:
        ``(O, n0, n1, n2)``, n the smaller of size and k.
    """
    kernel = as_size3(weight.shape[2:])
    constant = values.view(1, -1, 1, 1, 1).expand(1, -1, *(min(s, k) for s, k in zip(size, kernel)))
    return F.conv3d(constant, weight, padding=[k // 2 for k in kernel])[0]


def inside_of(response: torch.Tensor) -> torch.Tensor:
    """The entry ``(O,)`` that holds inside the map; a view."""
    return response[:, response.shape[1] // 2, response.shape[2] // 2, response.shape[3] // 2]


def _layers(size: Size3, entries: Size3) -> list[tuple[tuple[Any, ...], tuple[slice, ...]]]:
    """Indices of every entry but the middle one, in a response and in a map ``(B, O, D, H, W)``."""
    per_axis = []
    for edge, count in zip(size, entries):
        first, last = count // 2, count - count // 2 - 1
        starts = [*range(first), *range(edge - last, edge)]
        layers = [slice(start, start + 1) for start in starts]
        per_axis.append([*layers[:first], slice(first, edge - last), *layers[first:]])
    middle = tuple(count // 2 for count in entries)
    whole = slice(None)
    return [
        ((whole, *entry), (whole, whole, *(parts[i] for parts, i in zip(per_axis, entry))))
        for entry in product(*map(range, entries)) if entry != middle
    ]


def correct_border(canvas: torch.Tensor, response: torch.Tensor) -> None:
    """Turns a map to which :func:`inside_of` the response was added everywhere into one with the response, in place.

    Args:
        canvas: ``(B, O, D, H, W)``.
        response: see :func:`border_response`.
    """
    difference = response - inside_of(response)[:, None, None, None]
    for entry, layer in _layers(as_size3(canvas.shape[2:]), as_size3(response.shape[1:])):
        canvas[layer] += difference[entry].view(1, -1, 1, 1, 1)


def response_gradient(grad: torch.Tensor, total: torch.Tensor, entries: Size3) -> torch.Tensor:
    """Gradient of a response that was added to a map.

    Args:
        grad: of the map, ``(B, O, D, H, W)``.
        total: its sum over all voxels, ``(O,)``.
        entries: of the response per axis.

    Returns:
        ``(O, *entries)``, dtype of ``total``.
    """
    result = total.new_zeros(len(total), *entries)
    for entry, layer in _layers(as_size3(grad.shape[2:]), entries):
        result[entry] = grad[layer].sum((0, 2, 3, 4), dtype=total.dtype)
    inside_of(result).copy_(total - result.sum((1, 2, 3)))
    return result
