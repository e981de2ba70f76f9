"""What a run of `hyspark prepare` has done so far: one JSON object per line, kept in the data set's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nnunetv2_hyspark.data.writing import told_if_full

JOURNAL_NAME = "prepare_journal.jsonl"


class Journal:
    """The finished cases of a data set, and the sources they came from.

    A case's record is a dict with at least ``place`` (what the case is), ``key`` (its files' sizes and times and the
    settings) and ``id``. Later lines replace earlier ones. A last line cut off by an interruption is dropped.

    Args:
        folder: the data set's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL_NAME
        self.sources: list[str] = []
        self.records: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            self._load()

    def _load(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            # the next line must not be glued to a half one
            with open(self.path, "r+b") as stream:
                stream.truncate(len(whole))
        for line in whole.decode("utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if "sources" in entry:
                self.sources = entry["sources"]
            elif "place" in entry:
                self.records[entry["place"]] = entry

    def set_sources(self, sources: list[str]) -> None:
        """Note which sources the data set is made from.

        Raises:
            OSError: if it cannot be written.
        """
        if sources != self.sources:
            self.sources = sources
            self._append({"sources": sources})

    def add(self, record: dict[str, Any]) -> None:
        """Note a finished case; it is on disk when this returns.

        Raises:
            OSError: if it cannot be written.
        """
        self._append(record)
        self.records[record["place"]] = record

    def _append(self, entry: dict[str, Any]) -> None:
        with told_if_full(self.path), open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry, ensure_ascii=True) + "\n")
