"""One training at a time writes into a results folder."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

LOCK = ".training.lock"


def claim(folder: Path, warn: Callable[[str], None]) -> TextIO | None:
    """Claims a results folder for the training of this process; the claim ends when the file is closed or the process
    ends, however it ends.

    The lock is one of POSIX: forked data workers do not hold it. A lock that another machine holds is only warned of,
    because file servers keep those of machines that crashed for a while, and the run is to go on then.

    Args:
        folder: of one fold's results.
        warn: takes a sentence.

    Returns:
        the open lock file, or None where the file system or the operating system has no locks.

    Raises:
        RuntimeError: if another process of this machine trains there.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    path = folder / LOCK
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read(200).split()
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return None
        process, machine = holder if len(holder) == 2 else ("unknown", "an unknown machine")
        found = f"process {process} on {machine} trains in {folder} already"
        if machine == socket.gethostname():
            raise RuntimeError(
                f"{found}; two trainings would overwrite each other's checkpoints, so wait for it or stop it, or set "
                f"nnUNet_results to another folder."
            ) from None
        warn(f"WARNING: {found}, or that machine crashed; if it does, stop one of the two.")
        return None
    file.seek(0)
    file.truncate()
    print(os.getpid(), socket.gethostname(), file=file, flush=True)
    return file
