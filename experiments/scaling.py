"""Crops per second of a pre-training by 1, 2, ... processes on one machine, with the same batch.

    python experiments/scaling.py 930 --plans nnUNetHySparKPlans --batch 8 --processes 1 2 --rounds 3

Every process computes with one thread. The numbers of processes take turns; the figure of a run is that of its second
epoch, from its log, and that of the table the median over rounds. Nothing is left behind.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median


def crops_per_second(options: argparse.Namespace, processes: int, results: Path) -> float:
    """Runs two short epochs and returns the throughput of the second.

    Raises:
        RuntimeError: if the training fails; the message is the end of its output.
    """
    settings = (
        f"epochs=2,iterations_per_epoch={options.steps},val_iterations_per_epoch=1,batch_size={options.batch},"
        f"preview_every=0,seed=0"
    )
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m",
        "nnunetv2_hyspark.train", options.dataset, "3d_fullres", options.fold, "-p", options.plans, "-device",
        options.device, "--disable_checkpointing",
    ]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "nnUNet_results": str(results), "nnUNet_hyspark": settings,
        "nnUNet_n_proc_DA": os.environ.get("nnUNet_n_proc_DA", "1"),
    }
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    figures = re.findall(r"([\d.]+) crops/s", run.stdout)
    if run.returncode or len(figures) != 2:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(run.stdout + run.stderr)[-2000:]}")
    return float(figures[1])


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="number of a preprocessed data set")
    parser.add_argument("--plans", default="nnUNetHySparKPlans")
    parser.add_argument("--fold", default="0")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=8, help="crops per step, of all processes together")
    parser.add_argument("--steps", type=int, default=20, help="per epoch")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    measured: dict[int, list[float]] = {processes: [] for processes in options.processes}
    for number in range(options.rounds):
        for processes in options.processes if number % 2 == 0 else options.processes[::-1]:
            with tempfile.TemporaryDirectory() as results:
                measured[processes].append(crops_per_second(options, processes, Path(results)))
    base = measured[options.processes[0]]
    print(f"| processes | crops/s, median of {options.rounds} | lowest | highest | times {options.processes[0]} |")
    print("|---|---|---|---|---|")
    for processes, figures in measured.items():
        gain = median(figure / one for figure, one in zip(figures, base))
        print(f"| {processes} | {median(figures):.1f} | {min(figures):.1f} | {max(figures):.1f} | {gain:.2f} |")


if __name__ == "__main__":
    main()
