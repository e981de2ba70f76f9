"""The sections of HySparK's configuration, resolved for one training."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from ..configuration import ENVIRONMENT_VARIABLE, Source, parse_environment, resolve
from ..networks.topology import NETWORK_CLASS, ArchitectureConfig, derive_arch_kwargs
from ..planning.memory import MEMORY_SETTINGS
from ..planning.remembered import RememberedCheckpoint, remembered_checkpoint
from ..pretext.hyspark import HySparKConfig
from .finetuning import FinetuningConfig

Stage = Literal["pretraining", "finetuning"]

_OF_THE_PAPER_S_DECODER = ("decoder_width", "fuse_finest", "skips", "decoder_norm")
"""Keys of the pre-training that the segmentation network's decoder has no use for."""

_NOT_SETTINGS = ("memory", "checkpoint")
"""Keys of a configuration's ``"hyspark"`` block in which planners leave word."""


@dataclass(frozen=True)
class Settings:
    """Every hyperparameter of a run that nnU-Net's plan does not hold.

    Attributes:
        checkpoint: what the plan says fine-tuning starts from.
        unplanned: settings of pre-training that change its memory and are not those for which the planner chose the
            batch size that is used: name -> planned value, value of this run.
    """

    architecture: ArchitectureConfig
    pretraining: HySparKConfig
    finetuning: FinetuningConfig
    checkpoint: RememberedCheckpoint | None = None
    unplanned: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    def as_dict(self, stage: Stage) -> dict[str, dict[str, Any]]:
        """Plain values of the architecture and of one stage, for logs and checkpoints."""
        sections = asdict(self)
        return {name: _plain(sections[name]) for name in ("architecture", stage)}


def _plain(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in section.items()}


def resolve_settings(
    configuration: Mapping[str, Any], configuration_name: str, stage: Stage, environment: Mapping[str, str] = os.environ
) -> Settings:
    """Defaults, then the configuration's ``"hyspark"`` block, then the variable ``nnUNet_hyspark``.

    Args:
        configuration: a resolved nnU-Net configuration.
        configuration_name: for messages.
        stage: whose bare keys win.
        environment: where the variable is looked up.

    Raises:
        ValueError: for unknown keys, values out of range, values that would have no effect, or architecture keys that
            contradict a plan which already fixes the network.
    """
    block = configuration.get("hyspark", {})
    if not isinstance(block, Mapping):
        raise ValueError(
            f'the "hyspark" block of configuration {configuration_name} is {block!r}; expected settings by name, '
            f'such as {{"pretraining": {{"mask_ratio": 0.6}}}}, or no such block.'
        )
    planned = {key: value for key, value in block.items() if key not in _NOT_SETTINGS}
    sources = [Source(f"the \"hyspark\" block of configuration {configuration_name}", planned)]
    text = environment.get(ENVIRONMENT_VARIABLE, "")
    if text.strip():
        sources.append(Source(f"the variable {ENVIRONMENT_VARIABLE}", parse_environment(text)))
    defaults = {"architecture": ArchitectureConfig(), "pretraining": HySparKConfig(), "finetuning": FinetuningConfig()}
    sections, explicit = resolve(defaults, stage, ["architecture"], sources)
    settings = Settings(**sections, checkpoint=remembered_checkpoint(block, configuration_name))
    if stage == "pretraining":
        _check_decoder(settings.pretraining)
        settings = replace(settings, unplanned=_unplanned(settings.pretraining, block))
    fixed = sorted(key for key in explicit if key.startswith("architecture."))
    architecture = configuration.get("architecture", {})
    if fixed and architecture.get("network_class_name") == NETWORK_CLASS:
        fixed_kwargs = architecture["arch_kwargs"]
        asked = derive_arch_kwargs(fixed_kwargs["strides"], fixed_kwargs["kernel_sizes"], settings.architecture)
        differing = sorted(key for key in asked if asked[key] != fixed_kwargs.get(key, asked[key]))
        if differing:
            raise ValueError(
                f"{', '.join(fixed)} is set, but configuration {configuration_name} of this plans file already fixes "
                f"the HySparK network with another {', '.join(differing)}; plan again with -pl HySparKPlanner and the "
                f"same settings, or leave them out."
            )
    return settings


def _check_decoder(options: HySparKConfig) -> None:
    if options.decoder != "segmentation":
        return
    default = HySparKConfig()
    idle = [key for key in _OF_THE_PAPER_S_DECODER if getattr(options, key) != getattr(default, key)]
    if idle:
        said = ", ".join(f"{key}={str(getattr(options, key)).lower()}" for key in idle)
        raise ValueError(
            f"{said} belong{'s' if len(idle) == 1 else ''} to the paper's decoder, but decoder is segmentation, as by "
            f"default: the segmentation network's own, which has no such setting; set decoder=reconstruction too, or "
            f"leave {'it' if len(idle) == 1 else 'them'} out."
        )


def _unplanned(options: HySparKConfig, block: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """See :attr:`Settings.unplanned`; plans of earlier versions tell nothing."""
    memory = block.get("memory")
    planned = memory.get("pretraining") if isinstance(memory, Mapping) else None
    if not isinstance(planned, Mapping) or options.batch_size != block.get("pretraining", {}).get("batch_size"):
        return {}
    return {
        key: (planned[key], getattr(options, key))
        for key in MEMORY_SETTINGS
        if key in planned and planned[key] != getattr(options, key)
    }
