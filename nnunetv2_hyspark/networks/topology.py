"""From an nnU-Net plan to the hybrid network: which stages to keep, how wide and how deep they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..geometry import as_size3, cumulative_strides

NETWORK_CLASS = "nnunetv2_hyspark.networks.segmentation.HySparKUNet"

PAPER_STRIDES = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2))


@dataclass(frozen=True)
class ArchitectureConfig:
    """Hyperparameters of the hybrid network that a plan does not hold. Empty tuples mean: derived from the plan."""

    cnn: str = field(
        default="mednext",
        metadata={"choices": ("mednext", "residual", "plain"), "help": "stages above the transformer: the paper's "
                  "MedNeXt, or nnU-Net's residual or plain encoder"},
    )
    max_stride: int = field(
        default=16, metadata={"range": (2, 64), "help": "largest total stride per axis of the junction, voxels"}
    )
    base_width: int = field(
        default=32, metadata={"range": (4, 256), "help": "channels of the finest stage; doubled per stage"}
    )
    junction_width: int = field(
        default=0,
        metadata={"range": (0, 4096), "help": "channels of the junction and the transformer, a multiple of 6; "
                  "0: the next stage's width, at most 12 x base_width, rounded up to suit 6 and head_width"},
    )
    features_per_stage: tuple[int, ...] = field(default=(), metadata={"help": "widths, overrides the two above"})
    n_blocks_per_stage: tuple[int, ...] = field(
        default=(), metadata={"help": "default 1, 1, 3, ..., 3, 1; residual 1, 3, 4, 6, ...; plain 2, 2, ..."}
    )
    expansion_per_stage: tuple[int, ...] = field(default=(), metadata={"help": "default 2, 4, ..., 4, 2"})
    transformer_depth: int = field(default=3, metadata={"range": (0, 48), "help": "ViT blocks; 0 leaves the ViT out"})
    head_width: int = field(default=32, metadata={"range": (2, 256), "help": "channels per attention head"})
    mlp_ratio: float = field(default=4.0, metadata={"range": (0.5, 16.0), "help": "ViT MLP width over token width"})
    n_blocks_decoder: int = field(
        default=1, metadata={"range": (1, 8), "help": "MedNeXt blocks per scale of the segmentation decoder"}
    )
    expansion_decoder: int = field(
        default=4, metadata={"range": (1, 16), "help": "expansion of the segmentation decoder's blocks"}
    )


def stages_to_junction(strides: Sequence[Sequence[int]], max_stride: int) -> int:
    """How many of a plan's stages the CNN keeps: all whose total stride is at most ``max_stride`` on every axis.

    Raises:
        ValueError: if fewer than two stages qualify.
    """
    kept = sum(max(total) <= max_stride for total in cumulative_strides(strides))
    if kept < 2:
        raise ValueError(
            f"the plan's strides {[list(s) for s in strides]} leave {kept} stage up to total stride {max_stride}; "
            f"the hybrid encoder needs at least two, so plan a larger patch or raise max_stride."
        )
    return kept


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


def derive_arch_kwargs(
    strides: Sequence[Sequence[int]], kernel_sizes: Sequence[Sequence[int]], config: ArchitectureConfig
) -> dict[str, Any]:
    """``arch_kwargs`` of :class:`nnunetv2_hyspark.networks.segmentation.HySparKUNet` for a plan.

    With the paper's strides and defaults this is the paper's encoder: widths 32, 64, 128, 256, 384; blocks 1, 1, 3, 3,
    1; expansion 2, 4, 4, 4, 2; a ViT of depth 3 with 12 heads.

    Args:
        strides, kernel_sizes: per stage of the plan's network, finest first.
        config: what the plan does not say.

    Raises:
        ValueError: if the plan or the configuration does not make a network.
    """
    n = stages_to_junction(strides, config.max_stride)
    widths = [config.base_width * 2**stage for stage in range(n)]
    unit = math.lcm(6, config.head_width)
    widths[-1] = config.junction_width or round_up(min(widths[-1], 12 * config.base_width), unit)
    features = list(config.features_per_stage) or widths
    middle = max(n - 3, 0)
    usual = {"mednext": [1, 1, *[3] * middle, 1][-n:], "residual": [1, 3, 4, *[6] * n][:n], "plain": [2] * n}
    blocks = list(config.n_blocks_per_stage) or usual[config.cnn]
    expansion = list(config.expansion_per_stage) or [2, *[4] * (n - 2), 2]
    for name, values in (
        ("features_per_stage", features), ("n_blocks_per_stage", blocks), ("expansion_per_stage", expansion)
    ):
        if len(values) != n:
            raise ValueError(
                f"{name} has {len(values)} values {values}; this plan's encoder has {n} stages up to total stride "
                f"{config.max_stride}, so give {n} values or none."
            )
    if config.transformer_depth and features[-1] % unit:
        raise ValueError(
            f"the junction is {features[-1]} channels wide; the transformer needs a multiple of 6 and of "
            f"head_width {config.head_width}, for example {round_up(features[-1], unit)}."
        )
    other = {} if config.cnn == "mednext" else {"cnn": config.cnn}
    return {
        **other,
        "n_stages": n,
        "features_per_stage": features,
        "strides": [list(as_size3(s, "stride")) for s in strides[:n]],
        "kernel_sizes": [list(as_size3(k, "kernel size")) for k in kernel_sizes[:n]],
        "n_blocks_per_stage": blocks,
        "expansion_per_stage": expansion,
        "transformer_depth": config.transformer_depth,
        "transformer_heads": features[-1] // config.head_width if config.transformer_depth else 1,
        "mlp_ratio": config.mlp_ratio,
        "n_blocks_per_stage_decoder": [config.n_blocks_decoder] * (n - 1),
        "expansion_decoder": config.expansion_decoder,
    }


def architecture_of(configuration: Mapping[str, Any], config: ArchitectureConfig) -> dict[str, Any]:
    """The ``architecture`` entry of a plan's configuration, as our network.

    A plan that already names our network is taken as it is; any other plan lends its strides and kernel sizes.

    Args:
        configuration: a resolved nnU-Net configuration (``PlansManager.get_configuration(...).configuration``).
        config: what the plan does not say.

    Raises:
        ValueError: for a 2D configuration, or where :func:`derive_arch_kwargs` does.
    """
    patch_size = configuration["patch_size"]
    if len(patch_size) != 3:
        raise ValueError(
            f"the configuration has a {len(patch_size)}D patch {list(patch_size)}; HySparK networks are 3D, "
            f"so use a 3D configuration such as 3d_fullres."
        )
    architecture = configuration["architecture"]
    if architecture["network_class_name"] == NETWORK_CLASS:
        return dict(architecture)
    kwargs = architecture["arch_kwargs"]
    return {
        "network_class_name": NETWORK_CLASS,
        "arch_kwargs": derive_arch_kwargs(kwargs["strides"], kwargs["kernel_sizes"], config),
        "_kw_requires_import": [],
    }
