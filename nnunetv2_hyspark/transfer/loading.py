"""Loading a pre-trained encoder into a segmentation network."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import nn

from .reading import network_weights, read_checkpoint
from .report import Entry, LoadReport

ENCODER = "encoder."


def load_encoder(network: nn.Module, weights: Mapping[str, torch.Tensor], source: str) -> LoadReport:
    """Copies every ``encoder.*`` tensor into the network; everything else of the network stays as it is.

    Args:
        network: has an ``encoder``.
        weights: under our names.
        source: for messages.

    Returns:
        What was loaded, left fresh and skipped.

    Raises:
        ValueError: if the source does not cover the network's whole encoder, or a shape differs. The network is then
            unchanged.
    """
    target = network.state_dict()
    report = LoadReport(source)
    if not any(name.startswith(ENCODER) for name in weights):
        some = ", ".join(sorted(weights)[:4])
        raise ValueError(
            f"{source} has no encoder weights (its first ones: {some}); expected a checkpoint of "
            f"HySparKPretrainTrainer, or one converted with 'hyspark import'."
        )
    update, missing, misfits = {}, [], []
    for name, tensor in target.items():
        if not name.startswith(ENCODER):
            report.entries.append(Entry(name, "fresh", None, tuple(tensor.shape), "not part of the encoder"))
        elif name not in weights:
            missing.append(name)
        elif weights[name].shape != tensor.shape:
            misfits.append(f"{name}: {tuple(weights[name].shape)} in the file, {tuple(tensor.shape)} in the network")
        else:
            update[name] = weights[name]
            report.entries.append(Entry(name, "loaded", tuple(weights[name].shape), tuple(tensor.shape)))
    if missing or misfits:
        raise ValueError(_mismatch(source, missing, misfits, target, weights))
    for name, tensor in weights.items():
        if name not in update:
            reason = "pre-training only" if name.startswith("reconstruction.") else "not used by this network"
            if not name.startswith("decoder."):
                report.entries.append(Entry(name, "skipped", tuple(tensor.shape), None, reason))
    non_finite = [name for name, tensor in update.items() if not torch.isfinite(tensor).all()]
    if non_finite:
        raise ValueError(f"{source} holds NaN or infinite weights in {non_finite[0]}; use an earlier checkpoint.")
    network.load_state_dict(update, strict=False)
    return report


def _mismatch(
    source: str,
    missing: list[str],
    misfits: list[str],
    target: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
) -> str:
    stem = "encoder.cnn.stem.weight"
    if stem in target and stem in weights and target[stem].shape[1] != weights[stem].shape[1]:
        return (
            f"{source} was pre-trained on {weights[stem].shape[1]} input channel(s), the data set has "
            f"{target[stem].shape[1]}; pre-train on images with as many channels."
        )
    problems = [f"missing {name}" for name in missing] + misfits
    shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
    return (
        f"{source} does not fit this network's encoder ({shown}); plan the data set like the pre-training one, with "
        f"the same strides, kernel sizes and widths."
    )


def load_pretrained_encoder(network: nn.Module, filename: str | os.PathLike[str]) -> LoadReport:
    """Reads a checkpoint file and loads its encoder; see :func:`load_encoder` and :func:`read_checkpoint`."""
    checkpoint = read_checkpoint(filename)
    return load_encoder(network, network_weights(checkpoint, filename), str(filename))
