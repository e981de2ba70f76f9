"""What a checkpoint file is, for people: ours, nnU-Net's own or of the official HySparK release."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .archive import printable
from .description import FORMAT_VERSION, as_mapping, excerpt_of, format_version
from .official import is_official
from .reading import find_weights, read_plain

_KINDS = {"pretraining": "HySparK pre-training checkpoint", "finetuning": "HySparK fine-tuning checkpoint"}


def inspect_checkpoint(filename: str | os.PathLike[str]) -> dict[str, Any]:
    """Plain values that describe a checkpoint; of any format version, since looking at a newer one does no harm.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, holds no weights, or would need code to be executed.
    """
    checkpoint = read_plain(filename)
    weights, _ = find_weights(checkpoint, filename)
    description = checkpoint.get("hyspark")
    if not isinstance(description, Mapping):
        description = _describe_nnunet(checkpoint)
    version = format_version(checkpoint)
    facts: dict[str, Any] = {
        "file": str(filename),
        "size_bytes": Path(filename).stat().st_size,
        "kind": _kind(checkpoint, weights, description),
        "format_version": version or None,
        "readable": version <= FORMAT_VERSION,
        "trainer": checkpoint.get("trainer_name"),
        "epochs_done": checkpoint.get("current_epoch", checkpoint.get("epoch")),
        "parameters": count_parameters(weights),
        "finite": all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()),
    }
    facts.update({key: value for key, value in description.items() if key not in ("format_version", "kind")})
    return bounded(facts)


def _kind(
    checkpoint: Mapping[str, Any], weights: Mapping[str, torch.Tensor], description: Mapping[str, Any]
) -> str:
    stated = description.get("kind")
    if isinstance(stated, str) and stated in _KINDS:
        return _KINDS[stated] + (" (imported)" if description.get("origin") else "")
    if is_official(weights):
        if any(name.startswith("sparse_encoder.") for name in weights):
            return "training file of the official HySparK release (hyspark import converts it)"
        if any(name.startswith("decoder.") for name in weights):
            return "segmentation network of the official HySparK release (hyspark import converts its encoder)"
        return "encoder file of the official HySparK release (hyspark import converts it)"
    if "network_weights" in checkpoint and "init_args" in checkpoint:
        return "nnU-Net checkpoint"
    return "weights of unknown origin"


def _describe_nnunet(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The same facts from what nnU-Net itself stores."""
    arguments = checkpoint.get("init_args")
    plans = arguments.get("plans") if isinstance(arguments, Mapping) else None
    if not isinstance(arguments, Mapping) or not isinstance(plans, Mapping):
        return {}
    name = arguments.get("configuration")
    configuration = as_mapping(as_mapping(plans.get("configurations")).get(name) if isinstance(name, str) else None)
    return {
        "configuration_name": name,
        "configuration": excerpt_of(configuration),
        "architecture": configuration.get("architecture"),
        "plans_name": plans.get("plans_name"),
        "dataset_name": plans.get("dataset_name"),
        "transpose_forward": plans.get("transpose_forward"),
        "channel_names": as_mapping(arguments.get("dataset_json")).get("channel_names"),
    }


def count_parameters(weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Values per part of the network: the first name, and the second within an encoder.

    A segmentation decoder that reconstructed is in a file by two names and counts as ``decoder``.
    """
    counts: dict[str, int] = {}
    for name, tensor in weights.items():
        if name.startswith("reconstruction.decoder.") and name.removeprefix("reconstruction.") in weights:
            continue
        parts = name.split(".")
        part = ".".join(parts[: 2 if parts[0] in ("encoder", "sparse_encoder") else 1])
        counts[part] = counts.get(part, 0) + tensor.numel()
    return {printable(part, 60): count for part, count in counts.items()}


def bounded(value: Any, budget: int = 20000) -> Any:
    """A copy for printing of nested values from a file: plain, of limited depth, length and text, without tensors."""
    left = [budget]

    def copy(value: Any, depth: int) -> Any:
        left[0] -= 1
        if left[0] < 0 or depth > 12:
            return "..."
        if isinstance(value, Mapping):
            items = []
            for key, inner in value.items():
                if left[0] < 0:
                    break
                items.append((printable(str(key) if isinstance(key, (str, int)) else "?", 200), copy(inner, depth + 1)))
            return dict(items)
        if isinstance(value, (list, tuple)):
            copied = []
            for inner in value:
                if left[0] < 0:
                    break
                copied.append(copy(inner, depth + 1))
            return copied
        if value is None or isinstance(value, (bool, float)):
            return value
        if isinstance(value, int):
            return value if value.bit_length() < 256 else "a huge number"
        if isinstance(value, str):
            return printable(value, 2000)
        return f"a {type(value).__name__}"

    return copy(value, 0)
