"""Runs commands of nnU-Net for the user to watch: the command line, a progress bar, and a log file per command."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter

from tqdm import tqdm

_EPOCH = re.compile(r"Epoch (\d+)\s*$")
_LOSS = re.compile(r"(train_loss|val_loss) (-?[\d.]+)")


def find_command(name: str) -> str:
    """The path of an installed command, first next to this Python, then on PATH.

    Raises:
        FileNotFoundError: if there is none.
    """
    beside = str(Path(sys.executable).parent)
    found = shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if found is None:
        raise FileNotFoundError(
            f"the command {name} is not installed beside {sys.executable} nor on PATH; install nnunetv2 there."
        )
    return found


def run_and_show(command: Sequence[str], environment: Mapping[str, str], log: Path, epochs: int = 0) -> float:
    """Runs a command to its end, with a bar over its epochs if it is a training.

    Args:
        command: its name and arguments.
        environment: variables on top of this process's.
        log: where its output goes.
        epochs: how many to expect; 0 shows no bar.

    Returns:
        Seconds it took.

    Raises:
        RuntimeError: if it fails; the message holds its last line and the log's path.
    """
    print(f"\n$ {shlex.join(command)}", flush=True)
    start = perf_counter()
    last = ""
    with (
        open(log, "w", encoding="utf-8") as stream,
        subprocess.Popen(
            [find_command(command[0]), *command[1:]],
            env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
        tqdm(total=epochs or None, unit=" epochs", disable=not epochs, dynamic_ncols=True, mininterval=0.5) as bar,
    ):
        try:
            for line in process.stdout or ():
                stream.write(line)
                stream.flush()
                last = line.strip() or last
                epoch = _EPOCH.search(line)
                if epoch:
                    bar.update(int(epoch.group(1)) - bar.n)
                losses = _LOSS.search(line)
                if losses:
                    bar.set_postfix_str(f"{losses.group(1)} {losses.group(2)}")
        except BaseException:
            process.terminate()
            raise
        if process.wait() == 0 and epochs:
            bar.update(epochs - bar.n)
    if process.returncode:
        raise RuntimeError(f"{command[0]} ended with status {process.returncode} ({last}); its output is in {log}.")
    seconds = perf_counter() - start
    print(f"  done in {seconds:.0f} s", flush=True)
    return seconds
