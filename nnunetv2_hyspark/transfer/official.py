"""Names and shapes of the official HySparK release, mapped to ours and back.

The official training file holds ``sparse_encoder.embeddings.*`` (MedNeXt), ``sparse_encoder.mae.*`` (ViT),
``densify_projs.*``, ``mask_tokens.*`` and ``dense_decoder.*``; the official encoder file holds ``embeddings.*`` and
``mae.*``. Its position table and its ViT mask token are never stored here: positions are computed, and the token takes
no part in the result.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

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
    for pattern, template in _RULES:
        match = re.match(pattern, official)
        if match:
            groups = [int(g) for g in match.groups()]
            prefix = template
            for index, number in enumerate(groups):
                prefix = prefix.replace(f"{{{index}-1}}", str(number - 1)).replace(f"{{{index}}}", str(number))
            return prefix + official[match.end() :]
    raise ValueError(f"{official!r} is no parameter of the official HySparK release.")


def convert_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Reshapes an official tensor for our parameter ``name``: 1x1x1 convolutions of blocks are linear layers here,
    mask tokens are vectors."""
    if re.search(r"\.(expand|compress)\.weight$", name):
        return tensor.reshape(tensor.shape[:2])
    if name.startswith("reconstruction.mask_tokens."):
        return tensor.reshape(-1)
    return tensor


def from_official(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Official weights under our names and in our shapes. Raises ValueError for a foreign name."""
    converted = {}
    for official, tensor in state_dict.items():
        name = our_name(official)
        if name is not None:
            converted[name] = convert_tensor(name, tensor)
    return converted
