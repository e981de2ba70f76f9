"""From a file of the official HySparK release to a checkpoint of ours."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..networks.segmentation import HySparKUNet
from ..networks.topology import NETWORK_CLASS
from .description import CITATIONS, FORMAT_VERSION, package_versions
from .official import ENCODER_PREFIX, from_official, is_official, our_name
from .official_architecture import OfficialArchitecture, empty_model, infer_architecture
from .reading import find_weights, read_checkpoint
from .report import Entry, LoadReport

_DOWNSTREAM = "decoder."  # the official segmentation network's decoder


@dataclass(frozen=True)
class Imported:
    """A checkpoint of ours, what became of the official tensors, and the settings that make such a network."""

    checkpoint: dict[str, Any]
    report: LoadReport
    architecture: OfficialArchitecture

    @property
    def settings(self) -> dict[str, Any]:
        """Keys of ``nnUNet_hyspark`` under which our planner and trainers build this network."""
        return imported_settings(self.architecture)


def imported_settings(architecture: OfficialArchitecture) -> dict[str, Any]:
    """See :attr:`Imported.settings`. Strides and kernel sizes are the plan's."""
    kwargs = architecture.arch_kwargs
    total = 1
    for stride in kwargs["strides"]:
        total *= max(stride)
    settings: dict[str, Any] = {
        "max_stride": total,
        "features_per_stage": kwargs["features_per_stage"],
        "n_blocks_per_stage": kwargs["n_blocks_per_stage"],
        "expansion_per_stage": kwargs["expansion_per_stage"],
        "transformer_depth": kwargs["transformer_depth"],
        "head_width": kwargs["features_per_stage"][-1] // kwargs["transformer_heads"],
        "mlp_ratio": kwargs["mlp_ratio"],
    }
    if architecture.decoder_width:
        settings |= {
            "decoder": "reconstruction", "decoder_width": architecture.decoder_width, "fuse_finest": False,
            "decoder_norm": "batch",
        }
    return settings


def import_official(
    filename: str | os.PathLike[str], heads: int | None = None, strides: Sequence[int] | None = None
) -> Imported:
    """Reads an official encoder file, training file or segmentation network; nothing in it is executed.

    The result holds the encoder, the reconstruction decoder if the file has one, and a fresh segmentation decoder, as
    our own checkpoints of ``decoder=reconstruction`` do. What has no counterpart is carried along for the way back.

    Args:
        filename: the official file; prefixes ``module.`` and wrappers as ``{"module": ...}`` are understood.
        heads: see :func:`nnunetv2_hyspark.transfer.official_architecture.infer_architecture`.
        strides: the same.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, not official, or incomplete.
    """
    weights, others = find_weights(read_checkpoint(filename), filename)
    source = str(filename)
    if not is_official(weights):
        some = ", ".join(sorted(weights)[:4])
        raise ValueError(
            f"{source} is no file of the official HySparK release (its first weights: {some}); expected names such as "
            f"embeddings.stem.weight or sparse_encoder.embeddings.stem.weight."
        )
    report = LoadReport(source)
    downstream = {name: tensor for name, tensor in weights.items() if name.startswith(_DOWNSTREAM)}
    official = {name: tensor for name, tensor in weights.items() if name not in downstream}
    converted = from_official(official)
    positions = next((t for name, t in official.items() if name.endswith("mae.pos_embed")), None)
    architecture = infer_architecture(converted, positions, source, heads, strides)
    ours, carried = _fit(converted, official, architecture, source)
    for name, tensor in official.items():
        target = our_name(name)
        shape = tuple(tensor.shape)
        if target in ours and name not in carried:
            changed = tuple(ours[target].shape)
            reason = "" if changed == shape else "reshaped, same values"
            report.entries.append(Entry(target, "loaded", shape, changed, reason))
        else:
            report.entries.append(Entry(name, "skipped", shape, None, "unused there; kept for hyspark export"))
    for name, tensor in downstream.items():
        report.entries.append(Entry(name, "skipped", tuple(tensor.shape), None, "official segmentation decoder"))
    heads_used = architecture.arch_kwargs["transformer_heads"]
    report.notes.append(f"attention heads: {heads_used}, from {architecture.heads_from}")
    report.notes.append(f"strides from {architecture.strides_from}")
    fresh = fresh_segmentation_decoder(architecture)
    report.entries += [
        Entry(name, "fresh", None, tuple(t.shape), "untrained; stands there for nnU-Net's own loader")
        for name, t in fresh.items()
    ]
    checkpoint = {
        "network_weights": {**ours, **fresh},
        "hyspark": describe_import(architecture, filename),
        "official": {"names": list(official), "tensors": carried, "others": _plain_config(others)},
    }
    return Imported(checkpoint, report, architecture)


def _fit(
    converted: Mapping[str, torch.Tensor],
    official: Mapping[str, torch.Tensor],
    architecture: OfficialArchitecture,
    source: str,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Our weights, complete and of the right shapes, and the official tensors that have no place among them."""
    expected = {name: tuple(tensor.shape) for name, tensor in empty_model(architecture).state_dict().items()}
    ours = {name: tensor for name, tensor in converted.items() if name in expected}
    _identity_projection(ours, expected)
    missing = [name for name in expected if name not in ours]
    wrong = [name for name in ours if tuple(ours[name].shape) != expected[name]]
    unfinished = [name for name, tensor in ours.items() if not torch.isfinite(tensor).all()]
    if missing:
        raise ValueError(f"{source} lacks {missing[0]} and {len(missing) - 1} more; use the file as it was published.")
    if wrong:
        raise ValueError(
            f"{source} has {wrong[0]} of shape {tuple(ours[wrong[0]].shape)}, where its other tensors ask for "
            f"{expected[wrong[0]]}; use the file as it was published."
        )
    if unfinished:
        raise ValueError(f"{source} holds NaN or infinite weights in {unfinished[0]}; use another copy.")
    carried = {name: tensor for name, tensor in official.items() if our_name(name) not in ours}
    return {name: ours[name] for name in expected}, carried


def _identity_projection(ours: dict[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """The official release leaves the junction's projection out where it would not change the width."""
    weight, bias = "reconstruction.projections.0.weight", "reconstruction.projections.0.bias"
    if weight in expected and weight not in ours and bias not in ours and expected[weight][0] == expected[weight][1]:
        ours[weight] = torch.eye(expected[weight][0]).reshape(expected[weight])
        ours[bias] = torch.zeros(expected[bias])


def fresh_segmentation_decoder(architecture: OfficialArchitecture) -> dict[str, torch.Tensor]:
    """Weights under ``decoder.``, without which nnU-Net's own ``-pretrained_weights`` would refuse the file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = HySparKUNet(architecture.input_channels, 2, **architecture.arch_kwargs)
    return {name: tensor for name, tensor in network.state_dict().items() if name.startswith("decoder.")}


def describe_import(architecture: OfficialArchitecture, filename: str | os.PathLike[str]) -> dict[str, Any]:
    """The ``"hyspark"`` entry of an imported checkpoint; what the official release does not say is left out."""
    return {
        "format_version": FORMAT_VERSION,
        "kind": "pretraining",
        "origin": f"official HySparK release, {Path(filename).name}",
        "settings": imported_settings(architecture),
        "architecture": {
            "network_class_name": NETWORK_CLASS,
            "arch_kwargs": architecture.arch_kwargs,
            "_kw_requires_import": [],
        },
        "axis_order": "(B, C, D, H, W)",
        "versions": package_versions(),
        "citations": list(CITATIONS),
    }


def _plain_config(others: Mapping[str, Any]) -> dict[str, Any]:
    """What the official release keeps among its weights: its configuration, plain values."""
    try:
        return json.loads(json.dumps({key: value for key, value in others.items() if key == "config"}))
    except (TypeError, ValueError, RecursionError):
        return {}


def is_encoder_file(names: Sequence[str]) -> bool:
    """Whether official names are those of the encoder file, which lack the training file's first part."""
    return not any(name.startswith(ENCODER_PREFIX) for name in names)
