"""Whether what a checkpoint says about its network agrees with the weights it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .archive import printable


def check_description(
    build: Callable[[], nn.Module],
    arch_kwargs: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    parts: tuple[str, ...] = ("encoder.",),
) -> None:
    """Builds the described network without memory (device ``meta``) and compares names and shapes.

    A description can name a network of any size; only one as large as the file's own weights may be built.

    Args:
        build: makes the network from the description.
        arch_kwargs: of :class:`nnunetv2_hyspark.networks.segmentation.HySparKUNet`.
        weights: of the file, under our names.
        parts: prefixes of the tensors to compare.

    Raises:
        ValueError: if they disagree; and anything that a description without sense makes ``build`` raise.
    """
    blocks = [*arch_kwargs["n_blocks_per_stage"], *arch_kwargs["n_blocks_per_stage_decoder"]]
    number = sum(blocks) + arch_kwargs["transformer_depth"]
    if number > len(weights):
        raise ValueError(f"it names {number} blocks, the file holds {len(weights)} tensors")
    with torch.device("meta"):
        expected = build().state_dict()
    for name, tensor in expected.items():
        if not name.startswith(parts):
            continue
        if name not in weights:
            raise ValueError(f"it names a network with {name}, which the file does not hold")
        if weights[name].shape != tensor.shape:
            raise ValueError(
                f"it names a network whose {name} is {tuple(tensor.shape)}, in the file it is "
                f"{tuple(weights[name].shape)}"
            )


def reason_of(error: Exception) -> str:
    """What a description that lacks something, or holds something odd, made its reader raise, for a sentence."""
    if isinstance(error, KeyError):
        return f"there is no {printable(str(error), 80)}"
    return printable(" ".join(str(error).split()).rstrip(".") or type(error).__name__)
