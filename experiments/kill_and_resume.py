"""Kills a short pre-training run at random moments with SIGKILL, resumes it each time, and compares the end.

    nnUNet_n_proc_DA=0 OMP_NUM_THREADS=1 python experiments/kill_and_resume.py DATASET 3d_fullres 0 --kills 50

A reference run is left alone. Then runs are started, killed and gone on with (``--c``) until enough kills have been
struck and the last run has finished. After every kill each checkpoint is read with its checksums, and the furthest one
may not be behind the furthest one before. Finished runs must have the reference's losses and weights, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from nnunetv2_hyspark.training.checkpoints import FINAL, checkpoints_in, most_advanced, progress_of
from nnunetv2_hyspark.transfer.reading import read_checkpoint

SETTINGS = (
    "base_width=4,head_width=4,pretraining.epochs=12,iterations_per_epoch=4,val_iterations_per_epoch=1,"
    "pretraining.save_every=1,save_minutes=0.0001,preview_every=2,preview_cases=1"
)
LOSSES = ("train_losses", "val_losses", "gradient_norms", "lrs", "effective_rank")


def start(arguments: argparse.Namespace, results: Path, more: list[str], log: Any) -> subprocess.Popen:
    """Starts a run in a process group of its own."""
    command = [sys.executable, "-m", "nnunetv2_hyspark.train", arguments.dataset, arguments.configuration,
               arguments.fold, "-device", "cpu", *more]
    settings = os.environ.get("nnUNet_hyspark", SETTINGS)
    environment = {**os.environ, "nnUNet_results": str(results), "nnUNet_hyspark": settings}
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def run_folder(results: Path) -> Path | None:
    """Where the run's checkpoints are, once there are any."""
    found = sorted(results.glob("*/*/fold_*"))
    return found[0] if found else None


def outcome(results: Path) -> tuple[dict[str, torch.Tensor], dict[str, list[float]]]:
    """Weights and logged losses of a finished run."""
    folder = run_folder(results)
    assert folder is not None
    checkpoint = read_checkpoint(folder / FINAL)
    return checkpoint["network_weights"], {key: checkpoint["logging"][key] for key in LOSSES}


def main() -> None:
    """Prints a summary as JSON; ends with status 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("configuration")
    parser.add_argument("fold")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--work", type=Path, default=Path("kill_and_resume"))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--earliest", type=float, default=3.0, help="s after the start")
    parser.add_argument("--latest", type=float, default=9.0, help="s after the start")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    moments = random.Random(arguments.seed)
    log = open(arguments.work / "output.txt", "w")  # noqa: SIM115
    reference = arguments.work / "reference"
    if start(arguments, reference, [], log).wait():
        sys.exit(f"the reference run failed; see {log.name}.")
    weights, losses = outcome(reference)

    summary = dict.fromkeys(("kills", "while_saving", "before_first_checkpoint", "damaged", "went_back", "failed",
                             "runs_finished", "runs_equal"), 0)
    while summary["kills"] < arguments.kills:
        results = arguments.work / f"run_{summary['runs_finished']}"
        furthest, finished = (0, 0), False
        more: list[str] = []
        while not finished:
            process = start(arguments, results, more, log)
            try:
                wait = None
                if summary["kills"] < arguments.kills:
                    wait = moments.uniform(arguments.earliest, arguments.latest)
                finished = process.wait(wait) == 0
                if not finished:
                    summary["failed"] += 1
                    break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                summary["kills"] += 1
                folder = run_folder(results)
                kept = most_advanced(folder) if folder else None
                if folder is not None:
                    summary["while_saving"] += bool(list(folder.glob(".checkpoint_*.part")))
                    for path in folder.glob(".checkpoint_*.part"):
                        path.unlink()
                    for path in checkpoints_in(folder):
                        try:
                            read_checkpoint(path)
                        except ValueError:
                            summary["damaged"] += 1
                if kept is None:
                    summary["before_first_checkpoint"] += 1
                progress = (progress_of(kept) if kept else None) or (0, 0)
                summary["went_back"] += progress < furthest
                furthest = progress
                print(f"kill {summary['kills']}: {furthest[0]} epochs and {furthest[1]} steps are saved", flush=True)
                more = ["--c"]
        if not finished:
            break
        summary["runs_finished"] += 1
        found_weights, found_losses = outcome(results)
        same = found_losses == losses and all(torch.equal(found_weights[n], t) for n, t in weights.items())
        summary["runs_equal"] += same
        print(f"run {summary['runs_finished']} finished, {'equal' if same else 'DIFFERENT'}", flush=True)
    print(json.dumps(summary))
    lost = summary["damaged"] + summary["went_back"] + summary["failed"]
    sys.exit(bool(lost or summary["runs_equal"] != summary["runs_finished"]))


if __name__ == "__main__":
    main()
