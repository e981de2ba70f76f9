"""What became of every tensor when weights were loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

ACTIONS = ("loaded", "adapted", "fresh", "skipped")


@dataclass(frozen=True)
class Entry:
    """One tensor: its name, what was done, its shapes and why.

    Actions: ``loaded`` as it is; ``adapted`` to another shape; ``fresh``: of the network, not touched by the load;
    ``skipped``: of the file, not used.
    """

    name: str
    action: str
    source_shape: tuple[int, ...] | None
    target_shape: tuple[int, ...] | None
    reason: str = ""

    @property
    def parameters(self) -> int:
        """Number of values in the target, or in the source where there is no target."""
        return prod(self.target_shape if self.target_shape is not None else self.source_shape or ())


@dataclass
class LoadReport:
    """All entries of one load, and what a user should know about the source: spacing, normalization, channels."""

    source: str
    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    description: Mapping[str, Any] = field(default_factory=dict)
    """What the source says about itself."""

    def of(self, action: str) -> list[Entry]:
        """Entries with this action."""
        return [entry for entry in self.entries if entry.action == action]

    def totals(self) -> dict[str, dict[str, int]]:
        """Tensors and parameters per action."""
        return {
            action: {
                "tensors": len(self.of(action)),
                "parameters": sum(entry.parameters for entry in self.of(action)),
            }
            for action in ACTIONS
        }

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        entries = [{**asdict(entry), "parameters": entry.parameters} for entry in self.entries]
        return {"source": self.source, "totals": self.totals(), "notes": list(self.notes), "entries": entries}

    def write_json(self, filename: str | os.PathLike[str]) -> None:
        """Writes :meth:`as_dict`."""
        Path(filename).write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")

    def table(self) -> str:
        """One line per part of the network and action, then the single tensors whose shape changed, then notes."""
        rows: dict[tuple[str, str, str], list[Entry]] = {}
        for entry in self.entries:
            rows.setdefault((_part(entry.name), entry.action, entry.reason), []).append(entry)
        lines = [f"weights from {self.source}", f"{'part':<28}{'action':<10}{'tensors':>8}{'parameters':>13}  reason"]
        for (part, action, reason), entries in rows.items():
            total = sum(entry.parameters for entry in entries)
            lines.append(f"{part:<28}{action:<10}{len(entries):>8}{total:>13,}  {reason}".rstrip())
        for action, sums in self.totals().items():
            lines.append(f"{'total':<28}{action:<10}{sums['tensors']:>8}{sums['parameters']:>13,}")
        for entry in self.entries:
            other_shape = entry.target_shape is not None and entry.source_shape not in (None, entry.target_shape)
            if other_shape and entry.action != "loaded":
                lines.append(f"  {entry.name}: {entry.source_shape} -> {entry.target_shape}, {entry.action}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def _part(name: str) -> str:
    return ".".join(name.split(".")[:3] if name.startswith("encoder.cnn") else name.split(".")[:2])


def summarise(names: list[str], limit: int = 8) -> str:
    """Tensor names by module, for a message: ``encoder.cnn.stages.2.1 (10 tensors), ...``."""
    modules: dict[str, int] = {}
    for name in names:
        # weights of one block of a stage or of the transformer belong together
        module = ".".join(name.split(".")[:5 if name.startswith("encoder.cnn.stages") else 4]).removesuffix(".weight")
        module = module.removesuffix(".bias")
        modules[module] = modules.get(module, 0) + 1
    shown = [f"{module} ({count} tensor{'s' * (count > 1)})" for module, count in list(modules.items())[:limit]]
    more = len(modules) - limit
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
