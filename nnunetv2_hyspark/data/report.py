"""The result of `hyspark prepare` for people: a table, and a report file in two formats."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

from nnunetv2_hyspark.data.screening import Reason
from nnunetv2_hyspark.data.writing import whole_file

NAMED_IN_TABLE = 10
COLUMNS = (
    "id",
    "taken",
    "reason",
    "detail",
    "source",
    "files",
    "shape",
    "spacing_mm",
    "modality",
    "range",
    "foreground",
)


def summary(rows: list[dict[str, Any]], report_name: str) -> str:
    """Format one table: per source how many scans were found, taken, and skipped for which reason.

    Args:
        rows: one dict per scan with the keys ``source``, ``taken``, ``reason``, ``detail`` and ``files``.
        report_name: the file that lists them all.

    Returns:
        The table, followed by the first ten skipped scans by name (labels and excluded ones are only counted).
    """
    reasons = [reason.value for reason in Reason if any(row["reason"] == reason.value for row in rows)]
    table = [["source", "found", "taken", *reasons]]
    sources = list(dict.fromkeys(row["source"] for row in rows))
    for source in sources:
        table.append(_table_row(_shorten(source), [row for row in rows if row["source"] == source], reasons))
    if len(sources) > 1:
        table.append(_table_row("all", rows, reasons))
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])])
        for row in table
    ]
    lines.insert(1, "-" * len(lines[0]))
    expected = {Reason.LABEL.value, Reason.EXCLUDED.value}
    skipped = [row for row in rows if not row["taken"] and row["reason"] not in expected]
    if skipped:
        lines.append("")
    for row in skipped[:NAMED_IN_TABLE]:
        lines.append(f"skipped {row['files'][0]}: {row['reason']} ({row['detail']})")
    if len(skipped) > NAMED_IN_TABLE:
        lines.append(f"... and {len(skipped) - NAMED_IN_TABLE} more, all named in {report_name}")
    return "\n".join(lines)


def _table_row(title: str, rows: list[dict[str, Any]], reasons: list[str]) -> list[str]:
    counts = Counter(row["reason"] for row in rows)
    taken = sum(1 for row in rows if row["taken"])
    return [title, str(len(rows)), str(taken), *(str(counts[reason]) for reason in reasons)]


def _shorten(text: str, length: int = 40) -> str:
    return text if len(text) <= length else "..." + text[3 - length :]


def write_report(folder: Path, head: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write prepare_report.json (``head`` and all rows) and prepare_report.csv (all rows); return the CSV's path.

    Raises:
        OSError: if the disk is full or the folder cannot be written.
    """
    content = {**head, "cases": [{column: row.get(column) for column in COLUMNS} for row in rows]}
    write_json(folder / "prepare_report.json", content)
    target = folder / "prepare_report.csv"
    with whole_file(target, newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow([_cell(row.get(column)) for column in COLUMNS])
    return target


def _cell(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return " ".join(str(part) for part in value)
    return "" if value is None else value


def write_json(target: Path, content: object) -> None:
    """Write JSON; the file is never half-written.

    Raises:
        OSError: if the disk is full or the folder cannot be written.
    """
    with whole_file(target) as stream:
        json.dump(content, stream, indent=2)
