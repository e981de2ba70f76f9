"""What became of every tensor when weights were loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One tensor: its name, what was done (``loaded``, ``adapted``, ``skipped``, ``fresh``), its shapes and why."""

    name: str
    action: str
    source_shape: tuple[int, ...] | None
    target_shape: tuple[int, ...] | None
    reason: str = ""

    @property
    def parameters(self) -> int:
        """Number of values in the target, or in the source where there is no target."""
        count = 1
        for edge in self.target_shape if self.target_shape is not None else self.source_shape or ():
            count *= edge
        return count


@dataclass
class LoadReport:
    """All entries of one load."""

    source: str
    entries: list[Entry] = field(default_factory=list)

    def of(self, action: str) -> list[Entry]:
        """Entries with this action."""
        return [entry for entry in self.entries if entry.action == action]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"source": self.source, "entries": [asdict(entry) for entry in self.entries]}

    def table(self) -> str:
        """One line per part of the network and action, then the single tensors that were adapted."""
        rows: dict[tuple[str, str, str], list[Entry]] = {}
        for entry in self.entries:
            rows.setdefault((_part(entry.name), entry.action, entry.reason), []).append(entry)
        lines = [f"weights from {self.source}", f"{'part':<28}{'action':<10}{'tensors':>8}{'parameters':>13}  reason"]
        for (part, action, reason), entries in rows.items():
            total = sum(entry.parameters for entry in entries)
            lines.append(f"{part:<28}{action:<10}{len(entries):>8}{total:>13,}  {reason}".rstrip())
        for entry in self.of("adapted"):
            lines.append(f"  {entry.name}: {entry.source_shape} -> {entry.target_shape}")
        return "\n".join(lines)


def _part(name: str) -> str:
    return ".".join(name.split(".")[:3] if name.startswith("encoder.cnn") else name.split(".")[:2])
