"""`hyspark info`: what a checkpoint is and where it comes from."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `hyspark info`."""
    parser = subparsers.add_parser(
        "info",
        help="say what a checkpoint holds",
        description="Says what a checkpoint holds: ours, nnU-Net's own, or of the official HySparK release. Every byte "
        "is checked and nothing in the file is executed.",
    )
    parser.add_argument("checkpoint", help="a .pth file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print what the checkpoint says."""
    from nnunetv2_hyspark.transfer.inspection import inspect_checkpoint

    facts = inspect_checkpoint(options.checkpoint)
    print(json.dumps(facts, indent=2) if options.json else readable(facts))


def readable(facts: dict[str, Any]) -> str:
    """The facts of :func:`nnunetv2_hyspark.transfer.inspection.inspect_checkpoint` as text."""
    lines = [facts["file"], f"  {facts['kind']}, {facts['size_bytes'] / 1e6:.1f} MB"]
    if not facts["readable"]:
        lines.append(
            f"  WARNING: format {facts['format_version']} is newer than this version reads; "
            "install a newer nnunetv2-hyspark"
        )
    if not facts["finite"]:
        lines.append("  WARNING: some weights are NaN or infinite")
    parameters = ", ".join(f"{part} {count:,}" for part, count in facts["parameters"].items())
    configuration = facts.get("configuration") or {}
    rows = [
        ("origin", facts.get("origin")),
        ("trainer", facts.get("trainer")),
        ("epochs done", facts.get("epochs_done")),
        ("format version", facts.get("format_version")),
        ("parameters", parameters),
        ("data set", facts.get("dataset_name")),
        ("fingerprint", facts.get("dataset_fingerprint_sha256")),
        ("channels", facts.get("channel_names")),
        ("plans", facts.get("plans_name")),
        ("configuration", facts.get("configuration_name")),
        ("patch size", configuration.get("patch_size")),
        ("batch size", configuration.get("batch_size")),
        ("spacing (mm)", configuration.get("spacing")),
        ("normalization", configuration.get("normalization_schemes")),
        ("intensities", facts.get("foreground_intensity_properties_per_channel")),
        ("axis order", facts.get("axis_order")),
        ("transposed by", facts.get("transpose_forward")),
    ]
    lines += [f"  {name:<16}{_short(value)}" for name, value in rows if value not in (None, "", {}, [])]
    architecture = facts.get("architecture")
    if isinstance(architecture, dict):
        lines.append(f"  {'network':<16}{architecture.get('network_class_name')}")
        for key, value in (architecture.get("arch_kwargs") or {}).items():
            lines.append(f"    {key:<30}{_short(value)}")
    for title in ("settings", "versions"):
        section = facts.get(title)
        if isinstance(section, dict) and section:
            lines.append(f"  {title}")
            for key, value in section.items():
                lines.append(f"    {key:<30}{_short(value)}")
    if facts.get("citations"):
        lines.append("  please cite")
        lines += [f"    {citation}" for citation in facts["citations"]]
    return "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_short(inner)}" for key, inner in value.items())
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "[" + ", ".join(_short(inner) for inner in value) + "]"
    return str(value)
