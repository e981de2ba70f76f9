"""The network of a plans file, as pre-training would build it."""

from __future__ import annotations

import json
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from ..geometry import Size3, as_size3
from ..networks.topology import architecture_of
from ..pretext.build import build_hyspark
from ..pretext.hyspark import HySparKConfig
from ..training.settings import resolve_settings
from ..transfer.rebuilding import reason_of

# what values of the wrong kind make their readers raise
_ODD = (AttributeError, IndexError, KeyError, RuntimeError, TypeError)

LARGEST_DEPTH = 1000
"""Blocks of an encoder, transformer blocks among them."""


@dataclass(frozen=True)
class PlannedNetwork:
    """What a configuration of a plans file says about pre-training.

    Attributes:
        plans: the file.
        configuration: its configuration.
        channels: of the images.
        patch_size: voxels of a crop.
        batch_size: crops per step, in one part whatever ``accumulate`` says.
        arch_kwargs: of :class:`nnunetv2_hyspark.networks.segmentation.HySparKUNet`.
        pretraining: settings of pre-training, from the plans and ``nnUNet_hyspark``.
    """

    plans: str
    configuration: str
    channels: int
    patch_size: Size3
    batch_size: int
    arch_kwargs: dict[str, Any]
    pretraining: HySparKConfig

    def defaults(self) -> dict[str, Any]:
        """What a :class:`nnunetv2_hyspark.benchmark.request.Request` takes from the plan unless told otherwise."""
        return {
            "size": self.patch_size,
            "batch": self.batch_size,
            "mask_ratio": self.pretraining.mask_ratio,
            "base_width": self.arch_kwargs["features_per_stage"][0],
        }


def _resolve(plans: Any, file: Path, name: str) -> dict[str, Any]:
    """A configuration with what it inherits, and with every entry that is needed here."""
    configurations = plans.get("configurations") if isinstance(plans, dict) else None
    if not isinstance(configurations, dict):
        raise ValueError(f'{file} has no "configurations"; expected a plans file such as nnUNetHySparKPlans.json.')
    if name not in configurations:
        raise ValueError(
            f"{file} has no configuration {name}; give --configuration one of {', '.join(configurations)}."
        )
    try:
        resolved = PlansManager(plans).get_configuration(name).configuration
        for key in ("patch_size", "batch_size", "normalization_schemes"):
            resolved[key]
        for key in ("strides", "kernel_sizes"):
            resolved["architecture"]["arch_kwargs"][key]
    except KeyError as error:
        raise ValueError(
            f"configuration {name} of {file} has no {error.args[0]}, from which the network would follow; plan again, "
            f"for example with -pl HySparKPlanner."
        ) from None
    return resolved


def read_plan(file: Path, name: str) -> PlannedNetwork:
    """Reads a plans file: ours, or any that names strides and kernel sizes, as HySparKPretrainTrainer does.

    Args:
        file: such as ``nnUNetHySparKPlans.json``.
        name: of the configuration.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no plans file, has no such configuration, or pre-training cannot use that.
    """
    if not file.is_file():
        raise FileNotFoundError(f"the plans file {file} does not exist; give the path of one, with its .json.")
    try:
        plans = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); expected a plans file.") from None
    try:
        planned = _planned(plans, file, name)
    except _ODD as error:
        raise _no_network(file, name, error) from None
    try:
        _check_depth(planned.arch_kwargs)
        with torch.device("meta"):  # a description without sense shows here, before memory is asked for
            build_hyspark(planned.channels, planned.arch_kwargs, planned.pretraining)
    except (*_ODD, ArithmeticError, ValueError) as error:
        raise _no_network(file, name, error) from None
    return planned


def _check_depth(arch_kwargs: dict[str, Any]) -> None:
    """Raises ValueError for more blocks than could be built in reasonable time, even without memory."""
    blocks = (*arch_kwargs["n_blocks_per_stage"], *arch_kwargs["n_blocks_per_stage_decoder"])
    number = sum(blocks) + arch_kwargs["transformer_depth"]
    if number > LARGEST_DEPTH:
        raise ValueError(f"it names {number} blocks, at most {LARGEST_DEPTH} are expected")


def _no_network(file: Path, name: str, error: Exception) -> ValueError:
    return ValueError(
        f"configuration {name} of {file} does not describe a network ({reason_of(error)}); plan again, for example "
        f"with -pl HySparKPlanner."
    )


def _planned(plans: Any, file: Path, name: str) -> PlannedNetwork:
    resolved = _resolve(plans, file, name)
    if resolved.get("previous_stage") is not None:
        raise ValueError(
            f"configuration {name} of {file} is the second stage of a cascade, which is never pre-trained; give "
            f"--configuration 3d_fullres or 3d_lowres."
        )
    settings = resolve_settings(resolved, name, "pretraining")
    arch_kwargs = architecture_of(resolved, settings.architecture)["arch_kwargs"]
    return PlannedNetwork(
        str(file), name, len(resolved["normalization_schemes"]), as_size3(resolved["patch_size"], "patch size"),
        settings.pretraining.batch_size or operator.index(resolved["batch_size"]), arch_kwargs, settings.pretraining,
    )
