"""Rewrites the tables of docs/settings.md from the settings' own metadata: python scripts/settings_tables.py"""

from __future__ import annotations

from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from nnunetv2_hyspark.training.settings import ArchitectureConfig, FinetuningConfig, HySparKConfig

SECTIONS = (
    ("`architecture`: the network", ArchitectureConfig),
    ("`pretraining`: HySparKPretrainTrainer", HySparKConfig),
    ("`finetuning`: HySparKFinetuneTrainer and HySparKScratchTrainer", FinetuningConfig),
)
FIRST = "## `architecture`"
WORDS = {"int": "whole number", "float": "number"}


def number(value: float) -> str:
    """A limit, short."""
    if value == 2**31 - 1:
        return "2^31 - 1"
    return f"{value:.0e}".replace("e+0", "e") if abs(value) >= 1e4 else f"{value:g}"


def allowed(field: Field) -> str:
    """What values a setting takes."""
    limits, kind = field.metadata, str(field.type)
    if kind == "bool":
        return "true, false"
    if "range" in limits:
        low, high = (number(limit) for limit in limits["range"])
        span = f"between {low} and {high}, both excluded" if limits.get("open") else f"{low} to {high}"
        return f"{WORDS.get(kind, kind)}, {span}"
    if "choices" in limits:
        words = ", ".join(str(choice) for choice in limits["choices"])
        return f"list out of {words}" if kind.startswith("tuple") else words
    return "list of whole numbers" if kind.startswith("tuple") else kind


def default(value: Any) -> str:
    """A default as it is written in settings."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(list(value))
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def main() -> None:
    """Rewrites everything from the first table on."""
    path = Path("docs/settings.md")
    lines = [path.read_text(encoding="utf-8").split(FIRST)[0].rstrip(), ""]
    for title, config in SECTIONS:
        lines += [f"## {title}", "", "| setting | default | allowed | meaning |", "|---|---|---|---|"]
        for field in fields(config):
            help_text = field.metadata["help"]
            lines.append(f"| `{field.name}` | {default(field.default)} | {allowed(field)} | {help_text} |")
        lines.append("")
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
