"""Names and shapes of the official HySparK release, mapped to ours and back.

The official training file holds ``sparse_encoder.embeddings.*`` (MedNeXt), ``sparse_encoder.mae.*`` (ViT),
``densify_projs.*``, ``mask_tokens.*`` and ``dense_decoder.*``; the official encoder file holds ``embeddings.*`` and
``mae.*``. Its position table and its ViT mask token are never stored here: positions are computed, and the token takes
no part in the result.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

ENCODER_PREFIX = "sparse_encoder."

_IGNORED = re.compile(r"(^|\.)mae\.(pos_embed|mask_token)$")

_RULES: tuple[tuple[str, str], ...] = (
    (r"^(?:sparse_encoder\.)?embeddings\.stem\.", "encoder.cnn.stem."),
    (r"^(?:sparse_encoder\.)?embeddings\.layer(\d+)\.(\d+)\.conv1\.", "encoder.cnn.stages.{0-1}.{1}.depthwise."),
    (r"^(?:sparse_encoder\.)?embeddings\.layer(\d+)\.(\d+)\.norm\.", "encoder.cnn.stages.{0-1}.{1}.norm."),
    (r"^(?:sparse_encoder\.)?embeddings\.layer(\d+)\.(\d+)\.conv2\.", "encoder.cnn.stages.{0-1}.{1}.expand."),
    (r"^(?:sparse_encoder\.)?embeddings\.layer(\d+)\.(\d+)\.conv3\.", "encoder.cnn.stages.{0-1}.{1}.compress."),
    (r"^(?:sparse_encoder\.)?embeddings\.expend(\d+)\.", "encoder.cnn.widen.{0-1}."),
    (r"^(?:sparse_encoder\.)?mae\.", "encoder.transformer."),
    (r"^densify_projs\.(\d+)\.", "reconstruction.projections.{0}."),
    (r"^mask_tokens\.(\d+)$", "reconstruction.mask_tokens.{0}"),
    (r"^dense_decoder\.dec\.(\d+)\.up_sample\.", "reconstruction.up.{0}.upsample."),
    (r"^dense_decoder\.dec\.(\d+)\.conv\.", "reconstruction.up.{0}.convs."),
    (r"^dense_decoder\.fuse\.(\d+)\.conv\.", "reconstruction.fuse.{0-1}."),
    (r"^dense_decoder\.proj\.", "reconstruction.head."),
)

_BACK: tuple[tuple[str, str], ...] = (
    (r"^encoder\.cnn\.stem\.", "sparse_encoder.embeddings.stem."),
    (r"^encoder\.cnn\.stages\.(\d+)\.(\d+)\.depthwise\.", "sparse_encoder.embeddings.layer{0+1}.{1}.conv1."),
    (r"^encoder\.cnn\.stages\.(\d+)\.(\d+)\.norm\.", "sparse_encoder.embeddings.layer{0+1}.{1}.norm."),
    (r"^encoder\.cnn\.stages\.(\d+)\.(\d+)\.expand\.", "sparse_encoder.embeddings.layer{0+1}.{1}.conv2."),
    (r"^encoder\.cnn\.stages\.(\d+)\.(\d+)\.compress\.", "sparse_encoder.embeddings.layer{0+1}.{1}.conv3."),
    (r"^encoder\.cnn\.widen\.(\d+)\.", "sparse_encoder.embeddings.expend{0+1}."),
    (r"^encoder\.transformer\.", "sparse_encoder.mae."),
    (r"^reconstruction\.projections\.(\d+)\.", "densify_projs.{0}."),
    (r"^reconstruction\.mask_tokens\.(\d+)$", "mask_tokens.{0}"),
    (r"^reconstruction\.up\.(\d+)\.upsample\.", "dense_decoder.dec.{0}.up_sample."),
    (r"^reconstruction\.up\.(\d+)\.convs\.", "dense_decoder.dec.{0}.conv."),
    (r"^reconstruction\.fuse\.(\d+)\.", "dense_decoder.fuse.{0+1}.conv."),
    (r"^reconstruction\.head\.", "dense_decoder.proj."),
)


def is_official(names: Iterable[str]) -> bool:
    """Whether these are names of the official release."""
    return any(re.match(r"^(?:sparse_encoder\.)?embeddings\.stem\.", name) for name in names)


def our_name(official: str) -> str | None:
    """Our parameter name for an official one.

    Returns:
        The name, or None for what has no counterpart: positions, the ViT mask token, and ``dense_decoder.fuse.0``,
        which the official release declares and never uses.

    Raises:
        ValueError: for a name that is not of the official release.
    """
    if _IGNORED.search(official) or official.startswith("dense_decoder.fuse.0."):
        return None
    name = _translate(official, _RULES)
    if name is None:
        raise ValueError(f"{official!r} is no parameter of the official HySparK release.")
    return name


def official_name(ours: str) -> str:
    """The official training file's name for one of our pre-training parameters; inverse of :func:`our_name`.

    Raises:
        ValueError: for a parameter that the official release has not.
    """
    name = _translate(ours, _BACK)
    if name is None:
        raise ValueError(f"{ours!r} has no counterpart in the official HySparK release.")
    return name


def _translate(name: str, rules: tuple[tuple[str, str], ...]) -> str | None:
    for pattern, template in rules:
        match = re.match(pattern, name)
        if match:
            prefix = template
            for index, number in enumerate(int(group) for group in match.groups()):
                for shift in ("-1", "", "+1"):
                    prefix = prefix.replace(f"{{{index}{shift}}}", str(number + int(shift or 0)))
            return prefix + name[match.end() :]
    return None


def convert_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Reshapes an official tensor for our parameter ``name``: 1x1x1 convolutions of blocks are linear layers here,
    mask tokens are vectors."""
    if re.search(r"\.(expand|compress)\.weight$", name):
        if tensor.ndim != 5 or tensor.shape[2:] != (1, 1, 1):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected a 1x1x1 convolution.")
        return tensor.flatten(1)
    if name.startswith("reconstruction.mask_tokens."):
        return tensor.reshape(-1)
    return tensor


def convert_back(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`convert_tensor`; ``name`` is ours."""
    if re.search(r"\.(expand|compress)\.weight$", name):
        return tensor.reshape(*tensor.shape, 1, 1, 1)
    if name.startswith("reconstruction.mask_tokens."):
        return tensor.reshape(1, -1, 1, 1, 1)
    return tensor


def from_official(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Official weights under our names and in our shapes. Raises ValueError for a foreign name."""
    converted = {}
    for official, tensor in state_dict.items():
        name = our_name(official)
        if name is not None:
            converted[name] = convert_tensor(name, tensor)
    return converted
