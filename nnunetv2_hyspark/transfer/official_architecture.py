"""The network that official weights belong to, read off the shapes of the tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..geometry import as_size3
from ..networks.reconstruction import ReconstructionDecoder
from ..networks.segmentation import build_encoder

# The official release sets heads = image size // 8, and the position table has (image size // 16) ** 3 rows.
_HEADS_PER_GRID_EDGE = 2
_DEFAULT_HEAD_WIDTH = 32


@dataclass(frozen=True)
class OfficialArchitecture:
    """What the official tensors say.

    Attributes:
        input_channels: image channels.
        arch_kwargs: of :class:`nnunetv2_hyspark.networks.segmentation.HySparKUNet`.
        decoder_width: of the reconstruction decoder; 0 where the file has the encoder only.
        heads_from: where the number of heads comes from, in words.
        strides_from: the same for the strides.
    """

    input_channels: int
    arch_kwargs: dict[str, Any]
    decoder_width: int
    heads_from: str
    strides_from: str


def infer_architecture(
    weights: Mapping[str, torch.Tensor],
    positions: torch.Tensor | None,
    source: str,
    heads: int | None = None,
    strides: Sequence[int] | None = None,
) -> OfficialArchitecture:
    """Widths, depths, kernels and expansions from the tensors of an official file.

    Args:
        weights: official weights under our names and in our shapes.
        positions: the official position table ``(1, cells, width)``, if the file has it.
        source: for messages.
        heads: attention heads, if known; no tensor shows them.
        strides: total pooling per stage, one number each; else what the decoder shows, else 2.

    Raises:
        ValueError: if the tensors do not make a network of this kind.
    """
    try:
        return _infer(weights, positions, heads, strides)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ValueError(
            f"{source} lacks tensors of the official HySparK release ({error}); use the file as it was published."
        ) from None
    except ValueError as error:
        raise ValueError(f"{source} is no network of the official HySparK release: {error}") from None


def _infer(
    weights: Mapping[str, torch.Tensor],
    positions: torch.Tensor | None,
    heads: int | None,
    strides: Sequence[int] | None,
) -> OfficialArchitecture:
    stem = weights["encoder.cnn.stem.weight"]
    if stem.ndim != 5:
        raise ValueError(f"its stem has shape {tuple(stem.shape)}; expected a 3D convolution.")
    stages = _count(weights, r"encoder\.cnn\.stages\.(\d+)\.")
    blocks = [_count(weights, rf"encoder\.cnn\.stages\.{stage}\.(\d+)\.") for stage in range(stages)]
    first = [f"encoder.cnn.stages.{stage}.0." for stage in range(stages)]
    features = [weights[f"{block}depthwise.weight"].shape[0] for block in first]
    expansion = [weights[f"{block}expand.weight"].shape[0] // width for block, width in zip(first, features)]
    kernels = [list(weights[f"{block}depthwise.weight"].shape[2:]) for block in first]
    width = features[-1]
    depth = _count(weights, r"encoder\.transformer\.blocks\.(\d+)\.")
    mlp_ratio = weights["encoder.transformer.blocks.0.mlp.fc1.weight"].shape[0] / width if depth else 4.0
    heads, heads_from = _heads(width, positions, heads) if depth else (1, "no transformer")
    stage_strides, strides_from = _strides(weights, stages, strides)
    projection = weights.get("reconstruction.up.0.upsample.weight")
    return OfficialArchitecture(
        input_channels=stem.shape[1],
        arch_kwargs={
            "n_stages": stages,
            "features_per_stage": features,
            "strides": stage_strides,
            "kernel_sizes": kernels,
            "n_blocks_per_stage": blocks,
            "expansion_per_stage": expansion,
            "transformer_depth": depth,
            "transformer_heads": heads,
            "mlp_ratio": mlp_ratio,
            "n_blocks_per_stage_decoder": [1] * (stages - 1),
            "expansion_decoder": 4,
        },
        decoder_width=projection.shape[0] if projection is not None else 0,
        heads_from=heads_from,
        strides_from=strides_from,
    )


def _count(weights: Mapping[str, torch.Tensor], pattern: str) -> int:
    found = {int(match.group(1)) for name in weights if (match := re.match(pattern, name))}
    if found != set(range(len(found))):
        name = pattern.partition("(")[0].replace("\\", "")
        raise ValueError(f"the parts of its {name} are numbered {sorted(found)[:9]}; expected 0, 1, 2 and so on.")
    return len(found)


def _heads(width: int, positions: torch.Tensor | None, heads: int | None) -> tuple[int, str]:
    if heads is not None:
        source = "given"
    elif positions is not None and positions.ndim == 3:
        heads = _HEADS_PER_GRID_EDGE * round(positions.shape[1] ** (1 / 3))
        source = "the position table (official rule: image size / 8)"
    else:
        heads, source = width // _DEFAULT_HEAD_WIDTH, "head width 32, the official default"
    if heads < 1 or width % heads:
        raise ValueError(
            f"its transformer is {width} channels wide, which {heads} attention heads ({source}) do not divide; "
            f"give the number of heads."
        )
    return heads, source


def _strides(
    weights: Mapping[str, torch.Tensor], stages: int, strides: Sequence[int] | None
) -> tuple[list[list[int]], str]:
    if strides is not None:
        if len(strides) != stages or strides[0] != 1:
            raise ValueError(f"strides are {list(strides)} for {stages} stages; give one per stage, the first 1.")
        return [list(as_size3(stride, "stride")) for stride in strides], "given"
    up = [f"reconstruction.up.{step}.upsample.weight" for step in range(stages - 1)]
    if all(name in weights for name in up):
        coarse_to_fine = [list(as_size3(weights[name].shape[2:], "stride")) for name in up]
        return [[1, 1, 1], *coarse_to_fine[::-1]], "the decoder's transposed convolutions"
    return [[1, 1, 1], *[[2, 2, 2]] * (stages - 1)], "the official default"


def empty_model(architecture: OfficialArchitecture) -> nn.ModuleDict:
    """Encoder and, if there is one, decoder of this architecture without memory (device ``meta``), for their shapes."""
    kwargs = architecture.arch_kwargs
    with torch.device("meta"):
        encoder = build_encoder(
            architecture.input_channels, kwargs["features_per_stage"], kwargs["strides"], kwargs["kernel_sizes"],
            kwargs["n_blocks_per_stage"], kwargs["expansion_per_stage"], kwargs["transformer_depth"],
            kwargs["transformer_heads"], kwargs["mlp_ratio"],
        )
        model = nn.ModuleDict({"encoder": encoder})
        if architecture.decoder_width:
            model["reconstruction"] = ReconstructionDecoder(
                architecture.input_channels, encoder.feature_channels, encoder.strides, kwargs["kernel_sizes"],
                architecture.decoder_width, fuse_finest=False, norm="batch",
            )
    return model
