"""The checkpoint that a plans file remembers, so that fine-tuning finds it by itself."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEY = "checkpoint"
"""Its key in a configuration's ``"hyspark"`` block."""


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class RememberedCheckpoint:
    """A file and what was in it at planning.

    Attributes:
        path: absolute.
        sha256: of the whole file.
    """

    path: str
    sha256: str

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> RememberedCheckpoint:
        """A file as it is now."""
        absolute = Path(path).resolve()
        return cls(str(absolute), file_digest(absolute))

    def check(self) -> None:
        """Raises unless the file still is what it was.

        Raises:
            FileNotFoundError: if it is gone.
            ValueError: if it has changed.
        """
        if not Path(self.path).is_file():
            raise FileNotFoundError(
                f"the plans name the checkpoint {self.path}, which does not exist here; put it there, give another "
                f"one with -pretrained_weights, or train from scratch with -tr HySparKScratchTrainer."
            )
        if file_digest(self.path) != self.sha256:
            raise ValueError(
                f"the checkpoint {self.path} has changed since these plans were made; run hyspark plan-finetune again, "
                f"or give it with -pretrained_weights to use it as it is."
            )


def remembered_checkpoint(block: Mapping[str, Any], configuration_name: str) -> RememberedCheckpoint | None:
    """The checkpoint in a configuration's ``"hyspark"`` block, if there is one.

    Raises:
        ValueError: if the entry is not a path and a digest.
    """
    entry = block.get(KEY)
    if entry is None:
        return None
    if not isinstance(entry, Mapping) or not all(isinstance(entry.get(key), str) for key in ("path", "sha256")):
        raise ValueError(
            f'"{KEY}" in the "hyspark" block of configuration {configuration_name} is {entry!r}; expected an object '
            f'with "path" and "sha256", as hyspark plan-finetune writes it.'
        )
    return RememberedCheckpoint(entry["path"], entry["sha256"])
