"""The sections of HySparK's configuration, resolved for one training."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..configuration import ENVIRONMENT_VARIABLE, Source, parse_environment, resolve
from ..networks.topology import NETWORK_CLASS, ArchitectureConfig
from ..pretext.hyspark import HySparKConfig
from .finetuning import FinetuningConfig

Stage = Literal["pretraining", "finetuning"]


@dataclass(frozen=True)
class Settings:
    """Every hyperparameter of a run that nnU-Net's plan does not hold."""

    architecture: ArchitectureConfig
    pretraining: HySparKConfig
    finetuning: FinetuningConfig

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
        ValueError: for unknown keys, values out of range, or architecture keys where the plan already fixes the
            network.
    """
    sources = [Source(f"the \"hyspark\" block of configuration {configuration_name}", configuration.get("hyspark", {}))]
    text = environment.get(ENVIRONMENT_VARIABLE, "")
    if text.strip():
        sources.append(Source(f"the variable {ENVIRONMENT_VARIABLE}", parse_environment(text)))
    defaults = {"architecture": ArchitectureConfig(), "pretraining": HySparKConfig(), "finetuning": FinetuningConfig()}
    sections, explicit = resolve(defaults, stage, ["architecture"], sources)
    fixed = sorted(key for key in explicit if key.startswith("architecture."))
    if fixed and configuration.get("architecture", {}).get("network_class_name") == NETWORK_CLASS:
        raise ValueError(
            f"{', '.join(fixed)} is set, but configuration {configuration_name} of this plans file already fixes the "
            f"HySparK network; edit its \"architecture\" entry instead, or use a plain nnU-Net plan."
        )
    return Settings(**sections)
