"""From a checkpoint of ours to the layout of the official HySparK release."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from ..geometry import as_size3, cumulative_strides, divide, volume
from ..networks.vit import sincos_position_embedding
from .importing import is_encoder_file
from .official import ENCODER_PREFIX, convert_back, official_name
from .reading import network_weights, read_checkpoint

_OFFICIAL_DECODER = "decoder=reconstruction,fuse_finest=false,decoder_norm=batch,skips=concatenate"
_OUTSIDE = ("mae.pos_embed", "mae.mask_token")


def export_official(filename: str | os.PathLike[str], encoder_only: bool = False) -> dict[str, Any]:
    """A state dict under official names.

    An imported file comes back exactly as it was, names in their order included. A checkpoint of our own pre-training
    becomes a training file if its decoder is the official variant
    (``decoder=reconstruction,fuse_finest=false,decoder_norm=batch``); the parts that the official release declares but
    never uses are then zeros.

    Args:
        filename: checkpoint of ours.
        encoder_only: write an encoder file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the network cannot be expressed in the official layout.
    """
    checkpoint = read_checkpoint(filename)
    source = str(filename)
    ours = network_weights(checkpoint, filename)
    weights = {n: t for n, t in ours.items() if n.startswith(("encoder.", "reconstruction."))}
    if encoder_only or not any(name.startswith("reconstruction.") for name in weights):
        weights = {name: tensor for name, tensor in weights.items() if name.startswith("encoder.")}
        encoder_only = True
    if not weights:
        raise ValueError(f"{source} has no encoder; expected a checkpoint of HySparK.")
    _check_expressible(weights, source, encoder_only)
    exported = {official_name(name): convert_back(name, tensor) for name, tensor in weights.items()}
    carried = checkpoint.get("official")
    if isinstance(carried, Mapping):
        return _restore(exported, carried, encoder_only)
    exported.update(_position_table(checkpoint, exported, source))
    if encoder_only:
        return {name.removeprefix(ENCODER_PREFIX): tensor for name, tensor in exported.items()}
    exported.update(_unused_parts(exported))
    return exported


def _check_expressible(weights: Mapping[str, torch.Tensor], source: str, encoder_only: bool) -> None:
    if not encoder_only and any(name.startswith("reconstruction.decoder.") for name in weights):
        raise ValueError(
            f"{source} was pre-trained with decoder=segmentation, which the official release cannot express; pre-train "
            f"with {_OFFICIAL_DECODER}, or export the encoder alone with --encoder-only."
        )
    try:
        for name in weights:
            official_name(name)
    except ValueError as error:
        raise ValueError(f"{source} cannot be written in the official layout: {error}") from None
    if encoder_only:
        return
    scales = sum(name.startswith("reconstruction.up.") and name.endswith(".upsample.weight") for name in weights)
    fused = sum(name.startswith("reconstruction.mask_tokens.") for name in weights)
    batch_norm = any(name.endswith(".running_mean") for name in weights)
    concatenated = any(name.startswith("reconstruction.fuse.") for name in weights) or fused < 2
    if fused != scales or not batch_norm or not concatenated:
        raise ValueError(
            f"{source} has a decoder that the official release cannot express; pre-train with "
            f"{_OFFICIAL_DECODER}, or export the encoder alone with --encoder-only."
        )


def _restore(
    exported: dict[str, torch.Tensor], carried: Mapping[str, Any], encoder_only: bool
) -> dict[str, Any]:
    names, tensors, others = (carried.get(key) for key in ("names", "tensors", "others"))
    if not isinstance(names, list) or not isinstance(tensors, Mapping) or not isinstance(others, Mapping):
        raise ValueError("the checkpoint's entry 'official' is damaged; import the official file again.")
    names = [str(name) for name in names]
    if is_encoder_file(names):
        exported = {name.removeprefix(ENCODER_PREFIX): tensor for name, tensor in exported.items()}
    elif encoder_only:
        names = [name for name in names if name.startswith(ENCODER_PREFIX)]
        others = {}
    lost = [name for name in names if name not in exported and not isinstance(tensors.get(name), torch.Tensor)]
    if lost:
        raise ValueError(f"the checkpoint's entry 'official' lacks {lost[0]}; import the official file again.")
    result = {name: exported[name] if name in exported else tensors[name] for name in names}
    if encoder_only:
        result = {name.removeprefix(ENCODER_PREFIX): tensor for name, tensor in result.items()}
    return {**result, **others}


def _position_table(
    checkpoint: Mapping[str, Any], exported: Mapping[str, torch.Tensor], source: str
) -> dict[str, torch.Tensor]:
    """The official table of positions for the patch of pre-training, and its unused mask token."""
    norm = exported.get(f"{ENCODER_PREFIX}mae.norm.weight")
    if norm is None:
        return {}
    try:
        description = checkpoint["hyspark"]
        patch = as_size3(description["configuration"]["patch_size"])
        total = cumulative_strides(description["architecture"]["arch_kwargs"]["strides"])[-1]
        grid = divide(patch, total, "patch of size")
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source} does not say for which patch and strides the positions are ({error}); export the checkpoint "
            f"that pre-training wrote."
        ) from None
    width = norm.shape[0]
    table = sincos_position_embedding(torch.arange(volume(grid)), grid, width)[None]
    return dict(zip((ENCODER_PREFIX + name for name in _OUTSIDE), (table, torch.zeros(1, 1, width))))


def _unused_parts(exported: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the official training model declares and never uses: its first fusion and its stride-1 projection."""
    parts = {}
    width = exported["dense_decoder.dec.0.up_sample.weight"].shape[0]
    scales = sum(name.startswith("mask_tokens.") for name in exported)
    shapes = {"0.weight": (width, 2 * width, 3, 3, 3), "3.weight": (width, width, 3, 3, 3)}
    for conv, norm in (("0", "1"), ("3", "4")):
        prefix = "dense_decoder.fuse.0.conv."
        parts[f"{prefix}{conv}.weight"] = torch.zeros(shapes[f"{conv}.weight"])
        parts[f"{prefix}{conv}.bias"] = torch.zeros(width)
        parts[f"{prefix}{norm}.weight"] = torch.ones(width)
        parts[f"{prefix}{norm}.bias"] = torch.zeros(width)
        parts[f"{prefix}{norm}.running_mean"] = torch.zeros(width)
        parts[f"{prefix}{norm}.running_var"] = torch.ones(width)
        parts[f"{prefix}{norm}.num_batches_tracked"] = torch.tensor(0)
    finest = exported["sparse_encoder.embeddings.expend1.weight"].shape[0]
    parts[f"densify_projs.{scales}.weight"] = torch.zeros(width // 2**scales, finest, 3, 3, 3)
    parts[f"densify_projs.{scales}.bias"] = torch.zeros(width // 2**scales)
    parts[f"mask_tokens.{scales}"] = torch.zeros(1, finest, 1, 1, 1)
    return parts
