"""The SLURM example, run with stand-ins for srun and scontrol."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "slurm" / "pretrain.sbatch"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def cluster(tmp_path: Path):
    """Starts the script on a cluster whose srun does what it is told; returns process and environment."""
    log = tmp_path / "calls.txt"

    def start(srun: str, **variables: str) -> subprocess.Popen:
        scontrol = f'echo "scontrol $*" >> {log}\n[ "$1" = show ] && printf "node7\\nnode8\\n"\nexit 0\n'
        for name, body in (("srun", f'echo "srun $*" >> {log}\n{srun}\n'), ("scontrol", scontrol)):
            (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}")
            (tmp_path / name).chmod(0o755)
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "DATASET": "900", "nnUNet_preprocessed": "/p",
            "nnUNet_results": "/r", "SLURM_GPUS_ON_NODE": "4", "SLURM_NNODES": "2", "SLURM_JOB_ID": "31",
            "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_CPUS_PER_TASK": "48", **variables,
        }
        return subprocess.Popen(
            ["bash", str(SCRIPT)], env={k: v for k, v in environment.items() if v}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )

    start.log = log
    return start


def test_syntax() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_the_command(cluster) -> None:
    process = cluster("exit 0")
    assert process.wait(20) == 0
    (call,) = [line for line in cluster.log.read_text().splitlines() if line.startswith("srun")]
    assert call == (
        "srun --kill-on-bad-exit=1 torchrun --nnodes 2 --nproc-per-node 4 --rdzv-id 31-0 --rdzv-backend c10d "
        "--rdzv-endpoint node7:20031 -m nnunetv2_hyspark.train 900 3d_fullres all -tr HySparKPretrainTrainer "
        "-p nnUNetPlans"
    )


def test_a_requeued_job_goes_on(cluster) -> None:
    assert cluster("exit 0", SLURM_RESTART_COUNT="2").wait(20) == 0
    assert "--rdzv-id 31-2" in cluster.log.read_text() and cluster.log.read_text().rstrip().endswith("--c")


def test_before_the_time_is_up_the_training_saves_and_the_job_is_requeued(cluster) -> None:
    process = cluster("trap 'sleep 0.5; exit 143' TERM\nwhile true; do sleep 0.1; done")
    deadline = time.monotonic() + 20
    while not (cluster.log.exists() and "srun" in cluster.log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 0
    assert "scontrol requeue 31" in cluster.log.read_text()
    assert "status 143" in process.stdout.read()


def test_a_failure_is_no_reason_to_requeue(cluster) -> None:
    assert cluster("exit 7").wait(20) == 7
    assert "requeue" not in cluster.log.read_text()


def test_what_is_missing_is_named(cluster) -> None:
    process = cluster("exit 0", DATASET="")
    assert process.wait(20) != 0 and "set DATASET" in process.stdout.read()
