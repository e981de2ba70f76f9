"""Public commands, run with their output in a log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

YEAR = 365 * 24 * 3600.0


def run(
    log: Path,
    *command: str,
    settings: dict[str, Any] | None = None,
    until: float | None = None,
    **environment: str,
) -> bool:
    """Runs a command of this environment, in a process group of its own.

    Args:
        log: file that its output is added to.
        command: name and arguments.
        settings: for ``nnUNet_hyspark``.
        until: time by ``time.monotonic`` at which it is told to stop; None: never.
        environment: further variables.

    Returns:
        False if it was told to stop.

    Raises:
        RuntimeError: if it fails; the message is the end of its output.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    surroundings = {**os.environ, "nnUNet_hyspark": json.dumps(settings or {}), **environment}
    with log.open("a", encoding="utf-8") as output:
        print("$", *command, file=output, flush=True)
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / command[0]), *command[1:]], env=surroundings, stdout=output,
            stderr=output, stdin=subprocess.DEVNULL, start_new_session=True,
        )
        try:
            status = process.wait(None if until is None else max(0.0, min(until - time.monotonic(), YEAR)))
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            return False
        except BaseException:  # a signal that ends the study ends its command
            process.terminate()
            process.wait()
            raise
        finally:
            with suppress(ProcessLookupError):  # nnU-Net's own trainer leaves its workers behind when it is ended
                os.killpg(process.pid, signal.SIGKILL)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text(encoding='utf-8')[-2000:]}")
    return True
