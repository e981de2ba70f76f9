"""Writing small files so that they are whole or absent, and so that a full disk is answered in words."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

# the disk, the user's share of it, or the largest file allowed
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def told_if_full(target: Path) -> Iterator[None]:
    """Say which file could not be written for lack of room, and what to do; other errors pass.

    Args:
        target: what is written inside the ``with``.

    Raises:
        OSError: if the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise no_room(error.errno, str(error.strerror), target) from None


def no_room(code: int, reason: str, target: Path) -> OSError:
    """The error for a file that could not be written, with what is free in its folder and what to do."""
    free = shutil.disk_usage(target.parent).free
    problem = f"cannot write it ({reason}; {free / 2**20:.0f} MiB free)"
    return OSError(code, f"{problem}; make room and run the same command again", str(target))


@contextmanager
def whole_file(target: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open a text file under a temporary name, and give it its name at the end, so that it is never half-written.

    Args:
        target: its name.
        newline: as :func:`open`.

    Raises:
        OSError: if the disk is full or the folder cannot be written.
    """
    temporary = target.with_name(target.name + ".unfinished")
    with told_if_full(target):
        try:
            with open(temporary, "w", newline=newline, encoding="utf-8") as stream:
                yield stream
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
