"""Time and memory of `hyspark prepare` for very many small scans in a few folders.

    python experiments/many_cases.py --cases 10000 --folders 13 --processes 2

Writes scans of 16 x 16 x 16 voxels of noise (NIfTI, compressed), prepares them, and prepares them again when all is
done. The memory is the peak of the process that collects the results, without its workers. Nothing is left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk

EDGE = 16
COMMAND = """
import json, resource, sys
from nnunetv2_hyspark.cli.main import main
status = main(sys.argv[2:])
open(sys.argv[1], "w").write(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
sys.exit(status)
"""


def write_scans(folder: Path, cases: int, folders: int) -> None:
    """Scans in turn over the folders; no two are alike."""
    rng = np.random.default_rng(0)
    for number in range(folders):
        (folder / f"part_{number:03d}").mkdir(parents=True)
    for number in range(cases):
        image = sitk.GetImageFromArray(rng.integers(0, 1000, (EDGE, EDGE, EDGE), dtype=np.int16))
        sitk.WriteImage(image, str(folder / f"part_{number % folders:03d}" / f"scan_{number:06d}.nii.gz"), True)


def prepare(work: Path, processes: int) -> tuple[float, float]:
    """Runs the command and returns seconds, its start included, and the peak memory in MB (10^6 bytes).

    Raises:
        RuntimeError: if the command fails; the message is the end of its output.
    """
    arguments = ["prepare", "-d", "900", "-n", "Many", "--from", str(work / "scans"), "-np", str(processes)]
    environment = {**os.environ, "nnUNet_raw": str(work / "raw"), "OMP_NUM_THREADS": "1"}
    for name in ("nnUNet_preprocessed", "nnUNet_results"):
        environment.pop(name, None)
    begin = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", COMMAND, str(work / "peak.json"), *arguments],
        env=environment, capture_output=True, text=True,
    )
    seconds = time.perf_counter() - begin
    if run.returncode:
        raise RuntimeError(f"hyspark {' '.join(arguments)} failed:\n{(run.stdout + run.stderr)[-2000:]}")
    kibibytes = json.loads((work / "peak.json").read_text())
    return seconds, kibibytes * 1024 / 1e6


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--folders", type=int, default=13)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "raw").mkdir()
        write_scans(work / "scans", options.cases, options.folders)
        print("| run | cases | s | cases/s | peak, MB |\n|---|---|---|---|---|")
        for name in ("first", "again, all done"):
            seconds, peak = prepare(work, options.processes)
            content = json.loads((work / "raw" / "Dataset900_Many" / "dataset.json").read_text())
            taken = content["numTraining"]
            print(f"| {name} | {taken} | {seconds:.1f} | {taken / seconds:.0f} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    main()
