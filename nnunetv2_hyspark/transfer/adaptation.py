"""Weights for a network that differs in its input channels or kernel sizes, so that its output changes least."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F


def adapt_channels(
    weight: torch.Tensor, channels: int, chosen: Sequence[int] = (), masks: int = 0
) -> tuple[torch.Tensor, str]:
    """The first convolution for another number, order or choice of image channels.

    Without a choice every new channel gets the mean of the old ones, scaled so that an image repeated in all channels
    gives the response it gave before. With one, every new channel takes the weights of the old channel named for it;
    those of a channel that is named n times are divided by n, and -1 gives zeros: a channel without influence at first.

    Args:
        weight: ``(out, in, k0, k1, k2)``.
        channels: new number of input channels.
        chosen: for every new channel an old one, from 0, or -1; empty for no choice.
        masks: how many of the last new channels hold masks of an earlier stage, while the old ones are images; without
            a choice they get zeros, and the others are adapted among themselves.

    Returns:
        ``(out, channels, k0, k1, k2)``, and what was done.

    Raises:
        ValueError: if the choice does not fit the numbers of channels.
    """
    old = weight.shape[1]
    if masks and not chosen:
        images, how = adapt_channels(weight, channels - masks)
        zeros = weight.new_zeros(weight.shape[0], masks, *weight.shape[2:])
        notes = filter(None, (how, f"{masks} channel(s) of masks begin with zeros"))
        return torch.cat([images, zeros], 1), "; ".join(notes)
    if not chosen:
        if channels == old:
            return weight, ""
        mean = weight.mean(1, keepdim=True) * (old / channels)
        how = "repeated" if old == 1 else "averaged"
        return mean.expand(-1, channels, -1, -1, -1).clone(), (
            f"{old} -> {channels} input channels: {how} and rescaled, same response to a repeated image"
        )
    if len(chosen) != channels or not all(-1 <= index < old for index in chosen) or max(chosen) < 0:
        raise ValueError(
            f"adapt_channels is {list(chosen)} for {channels} image channel(s) and weights with {old}; expected one "
            f"entry per image channel, from 0 to {old - 1}, or -1 for no weights, not all -1."
        )
    if list(chosen) == list(range(old)):
        return weight, ""
    parts = [
        weight[:, index] / list(chosen).count(index) if index >= 0 else torch.zeros_like(weight[:, 0])
        for index in chosen
    ]
    return torch.stack(parts, 1), f"input channels taken from {list(chosen)} of {old}"


def adapt_kernel(weight: torch.Tensor, kernel: Sequence[int]) -> tuple[torch.Tensor, str]:
    """A convolution's weight for another odd kernel size.

    A larger kernel is the old one with zeros around it, which computes the same. A smaller one keeps the old one's
    centre, which is an approximation.

    Args:
        weight: ``(out, in, k0, k1, k2)``.
        kernel: new size.

    Returns:
        ``(out, in, *kernel)``, and what was done.

    Raises:
        ValueError: if a size is even.
    """
    old = tuple(weight.shape[2:])
    new = tuple(kernel)
    if old == new:
        return weight, ""
    if len(old) != 3 or any(size % 2 == 0 for size in (*old, *new)):
        raise ValueError(f"a kernel of size {old} cannot become one of size {new}; both must be odd in 3D.")
    pad: list[int] = []
    for before, after in zip(reversed(old), reversed(new)):
        pad += [(after - before) // 2] * 2
    how = "zero-padded, exact" if all(a >= b for a, b in zip(new, old)) else "cropped to its centre, approximate"
    return F.pad(weight, pad), f"kernel {_times(old)} -> {_times(new)}: {how}"


def _times(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
