"""Runs as processes: killed, stopped, distributed, with dying workers and ranks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from nnunetv2_hyspark.training.checkpoints import FINAL, LATEST, progress_of
from nnunetv2_hyspark.transfer.reading import read_checkpoint
from tests.training.small_dataset import NAME, SETTINGS, write_small_dataset

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 240

# The second process dies at a step, once; or everything is computed in double precision.
FAULTY = """
import functools, os, signal, sys
from pathlib import Path
import torch
from nnunetv2_hyspark import train
from nnunetv2_hyspark.training.previews import Previews
from nnunetv2_hyspark.trainers.HySparKPretrainTrainer import HySparKPretrainTrainer as Trainer

step, build, validate, move = (
    Trainer.train_step, Trainer.build_network_architecture, Trainer.perform_actual_validation, Trainer.to_device
)

class Double:
    def __init__(self, network):
        self.network = network

    def __call__(self, image, visible):
        return self.network(image.double(), visible).float()

    def __getattr__(self, name):
        return getattr(self.network, name)

def train_step(self, batch):
    died = Path("died")
    if self.rank == 1 and self.step == int(os.environ.get("DIE_AT", "-1")) and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch)

Trainer.train_step = train_step
if os.environ.get("DOUBLE"):
    doubled = functools.wraps(build)(lambda *args: build(*args).double())  # nnU-Net looks at the signature
    Trainer.build_network_architecture = staticmethod(doubled)
    Trainer.to_device = lambda self, batch: move(self, {**batch, "data": batch["data"].double()})
    draw = Previews.draw
    Previews.draw = lambda self, network, *args: draw(self, Double(network), *args)
    Trainer.perform_actual_validation = lambda self, *args: (self.network.float(), validate(self, *args))
train.main(sys.argv[1:])
"""

# nnU-Net's own -num_gpus, with what names a GPU in it replaced: its processes are on the CPU.
NUM_GPUS = """
from pathlib import Path

import torch
from torch import distributed as dist
from nnunetv2.run import run_training as nnunet
from nnunetv2_hyspark import _startup

_startup.install()
make_trainer, run_process = nnunet.get_trainer_from_args, nnunet.run_ddp

def on_cpu(rank, *arguments):
    nnunet.setup_ddp = lambda rank, size: dist.init_process_group("gloo", rank=rank, world_size=size)
    torch.cuda.set_device = lambda device: None
    nnunet.get_trainer_from_args = lambda *settings: make_trainer(*settings, device=torch.device("cpu"))
    run_process(rank, *arguments)
    names = sorted(file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm"))
    Path(f"threads_{rank}.txt").write_text("\\n".join(names))

if __name__ == "__main__":
    nnunet.run_ddp = on_cpu
    nnunet.run_training_entry()
"""


class Runs:
    """Trainings of a small data set below one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("raw", "preprocessed"):
            (folder / name).mkdir()
        write_small_dataset(folder / "preprocessed", batch_size=4)
        (folder / "faulty.py").write_text(FAULTY)
        (folder / "num_gpus.py").write_text(NUM_GPUS)

    def environment(self, results: str, settings: str, **variables: str) -> dict[str, str]:
        return {
            **os.environ,
            **{f"nnUNet_{name}": str(self.folder / name) for name in ("raw", "preprocessed")},
            "nnUNet_results": str(self.folder / results),
            "nnUNet_hyspark": f"{SETTINGS},{settings}".rstrip(","),
            "nnUNet_n_proc_DA": "0",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            **variables,
        }

    def start(
        self, results: str, *more: str, processes: int = 0, restarts: int = 0, settings: str = "",
        launch: Sequence[str] = (), **variables: str,
    ) -> subprocess.Popen:
        """Starts a training, by torchrun if ``processes`` is given; ``launch`` are other arguments of torchrun."""
        if processes:
            launch = ["--standalone", "--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
        torchrun = ["-m", "torch.distributed.run", *launch] if launch else []
        script = [str(self.folder / "faulty.py"), NAME, "3d_fullres", "0", "-device", "cpu", *more]
        return self.execute(results, [*torchrun, *script], settings, **variables)

    def execute(self, results: str, arguments: Sequence[str], settings: str, **variables: str) -> subprocess.Popen:
        """Starts Python with these arguments."""
        return subprocess.Popen(
            [sys.executable, *arguments], env=self.environment(results, settings, **variables), cwd=self.folder,
            text=True, stdout=open(self.folder / f"{results}.txt", "a"), stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def output(self, results: str) -> str:
        return (self.folder / f"{results}.txt").read_text()

    def finish(self, process: subprocess.Popen, results: str, status: int = 0) -> None:
        try:
            assert process.wait(TIMEOUT) == status, self.output(results)[-4000:]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"hangs:\n{self.output(results)[-4000:]}")

    def fold(self, results: str) -> Path:
        (folder,) = (self.folder / results).glob("*/*/fold_0")
        return folder

    def wait_for(self, results: str, text: str) -> None:
        deadline = time.monotonic() + TIMEOUT
        while text not in self.output(results):
            assert time.monotonic() < deadline, self.output(results)[-4000:]
            time.sleep(0.02)


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def difference(a: Path, b: Path) -> float:
    """Largest difference of logged losses and of weights between two finished runs."""
    first, second = read_checkpoint(a / FINAL), read_checkpoint(b / FINAL)
    losses = [
        abs(x - y)
        for key in ("train_losses", "val_losses", "gradient_norms")
        for x, y in zip(first["logging"][key], second["logging"][key], strict=True)
    ]
    weights = [
        (tensor - second["network_weights"][name]).abs().max().item()
        for name, tensor in first["network_weights"].items()
    ]
    return max(*losses, *weights)


def test_two_processes_equal_one(runs: Runs) -> None:
    # in double precision, because Adam turns the rounding of a gradient that is zero into a whole step
    pictures = "preview_every=1,preview_cases=3"
    runs.finish(runs.start("one", settings=pictures, DOUBLE="1"), "one")
    runs.finish(runs.start("two", processes=2, settings=pictures, DOUBLE="1"), "two")
    runs.finish(runs.start("parts", processes=2, settings="accumulate=2", DOUBLE="1"), "parts")
    assert difference(runs.fold("one"), runs.fold("two")) < 1e-5
    assert difference(runs.fold("one"), runs.fold("parts")) < 1e-5
    summaries = [
        json.loads((runs.fold(name) / "validation" / "summary.json").read_text()) for name in ("one", "two")
    ]
    assert [[c["case"] for c in s["metric_per_case"]] for s in summaries][0] == [
        c["case"] for c in summaries[1]["metric_per_case"]
    ]
    assert abs(summaries[0]["mean"]["loss"] - summaries[1]["mean"]["loss"]) < 1e-5
    first, second = (
        sorted(str(path.relative_to(runs.fold(name))) for path in (runs.fold(name) / "previews").rglob("*"))
        for name in ("one", "two")
    )
    assert first == second and sum("epoch_" in name for name in first) >= 6


def test_in_single_precision_losses_and_gradients_are_equal_too(runs: Runs) -> None:
    """As long as no step of Adam enlarges their rounding: the rate is so small that weights stay as they are."""
    settings = "pretraining.learning_rate=1e-12"
    runs.finish(runs.start("one", settings=settings), "one")
    runs.finish(runs.start("two", processes=2, settings=settings), "two")
    assert difference(runs.fold("one"), runs.fold("two")) < 1e-5


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def two_machines() -> list[str]:
    """Arguments of torchrun on each of two machines with one process; both are this one."""
    return ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint",
            f"localhost:{free_port()}", "--local-addr", "localhost"]


def test_two_machines_equal_one_with_two_processes(runs: Runs) -> None:
    """And each writes what belongs to it into the same results folder."""
    runs.finish(runs.start("one", processes=2), "one")
    launch = two_machines()
    machines = [runs.start("two", launch=launch) for _ in range(2)]
    for process in machines:
        runs.finish(process, "two")
    assert difference(runs.fold("one"), runs.fold("two")) == 0
    names = [{str(path.relative_to(runs.fold(r))) for path in runs.fold(r).rglob("*")} for r in ("one", "two")]
    kept = [{name for name in some if not name.startswith("training_log_")} for some in names]
    assert kept[0] == kept[1]


def test_a_machine_that_dies_ends_the_other_and_the_run_goes_on(runs: Runs) -> None:
    launch, settings = two_machines(), "pretraining.epochs=1000,save_minutes=0.000001"
    machines = [runs.start("dead", launch=launch, settings=settings) for _ in range(2)]
    runs.wait_for("dead", "Epoch 1")
    # torchrun gives its processes sessions of their own; a machine that dies takes them along
    of_second = [machines[1].pid, *children_of(machines[1].pid)]
    for pid in of_second:
        os.kill(pid, signal.SIGKILL)
    started = time.monotonic()
    machines[1].wait()
    assert machines[0].wait(TIMEOUT) != 0
    assert time.monotonic() - started < 120
    # which of the two kept the addresses of all, and so who notices first, is left to chance
    reasons = ("RendezvousConnectionError", "ChildFailedError", "Connection closed by peer")
    assert any(reason in runs.output("dead") for reason in reasons), runs.output("dead")[-2000:]
    epoch, step = progress_of(runs.fold("dead") / LATEST) or (0, 0)
    assert (epoch, step) > (0, 0)
    runs.finish(runs.start("dead", "--c", settings=f"pretraining.epochs={epoch + 2}"), "dead")
    assert "Going on from" in runs.output("dead")
    assert progress_of(runs.fold("dead") / FINAL) == (epoch + 2, 0)


def test_num_gpus_is_the_same_as_torchrun(runs: Runs) -> None:
    """nnU-Net's own way to several GPUs, up to the GPUs themselves."""
    runs.finish(runs.start("torchrun", processes=2), "torchrun")
    command = ["num_gpus.py", NAME, "3d_fullres", "0", "-tr", "HySparKPretrainTrainer", "-num_gpus", "2"]
    runs.finish(runs.execute("num_gpus", command, ""), "num_gpus")
    assert difference(runs.fold("torchrun"), runs.fold("num_gpus")) == 0
    # a thread of the process group that is left when Python shuts down may end the process with SIGABRT
    left = [(runs.folder / f"threads_{rank}.txt").read_text() for rank in range(2)]
    assert not any("gloo" in names for names in left), left
    tuned = [*command[:4], "-tr", "HySparKScratchTrainer", *command[6:]]
    process = runs.execute("tuned", tuned, "finetuning.epochs=2", nnUNet_n_proc_DA="1")
    runs.wait_for("tuned", "Training done")
    os.killpg(process.pid, signal.SIGKILL)  # this data set has no files to validate segmentations with
    process.wait()
    assert progress_of(runs.fold("tuned") / FINAL) == (2, 0)


def test_a_rank_that_dies_ends_all_with_a_message(runs: Runs) -> None:
    started = time.monotonic()
    process = runs.start("dead", processes=2, DIE_AT="4")
    runs.finish(process, "dead", status=1)
    assert time.monotonic() - started < 120
    text = runs.output("dead")
    assert "Signal 9 (SIGKILL)" in text or "exitcode  : -9" in text


def test_an_elastic_restart_goes_on(runs: Runs) -> None:
    runs.finish(runs.start("whole", processes=2), "whole")
    settings = "save_minutes=0.000001"
    runs.finish(runs.start("restarted", processes=2, restarts=1, settings=settings, DIE_AT="4"), "restarted")
    assert (runs.folder / "died").exists() and "Going on from" in runs.output("restarted")
    assert difference(runs.fold("whole"), runs.fold("restarted")) == 0


@pytest.mark.parametrize("processes", [0, 2])
def test_stopped_by_a_scheduler_and_gone_on_with(runs: Runs, processes: int) -> None:
    settings = "pretraining.epochs=40"
    process = runs.start("stopped", processes=processes, settings=settings, nnUNet_n_proc_DA="2")
    runs.wait_for("stopped", "Epoch 2")
    if processes:
        process.terminate()  # torchrun passes it on
        assert process.wait(TIMEOUT) != 0
    else:
        os.killpg(process.pid, signal.SIGTERM)  # workers too, as SLURM does
        runs.finish(process, "stopped", status=143)
    assert "Stopped by SIGTERM. Progress is saved" in runs.output("stopped")
    epoch, step = progress_of(runs.fold("stopped") / LATEST) or (0, 0)
    assert (epoch, step) >= (2, 0)
    settings = f"pretraining.epochs={epoch + 2}"
    runs.finish(runs.start("stopped", "--c", processes=processes, settings=settings), "stopped")
    assert progress_of(runs.fold("stopped") / FINAL) == (epoch + 2, 0)


@pytest.mark.parametrize("processes", [0, 2])
def test_fine_tuning_stops_saves_and_goes_on_too(runs: Runs, processes: int) -> None:
    trainer = ("-tr", "HySparKScratchTrainer")
    process = runs.start(
        "tuned", *trainer, processes=processes, settings="finetuning.epochs=100", nnUNet_n_proc_DA="1"
    )
    runs.wait_for("tuned", "Epoch 1")
    process.terminate()
    assert process.wait(TIMEOUT) == (1 if processes else 143)
    assert "Stopped by SIGTERM. Progress is saved" in runs.output("tuned")
    epoch, _ = progress_of(runs.fold("tuned") / LATEST) or (0, 0)
    assert epoch >= 1
    process = runs.start("tuned", "--c", *trainer, settings=f"finetuning.epochs={epoch + 1}", nnUNet_n_proc_DA="1")
    runs.wait_for("tuned", "Training done")
    os.killpg(process.pid, signal.SIGKILL)  # this data set has no files to validate segmentations with
    process.wait()
    assert progress_of(runs.fold("tuned") / FINAL) == (epoch + 1, 0)


def test_a_killed_worker_ends_the_run_with_its_reason(runs: Runs) -> None:
    process = runs.start("worker", settings="pretraining.epochs=1000", nnUNet_n_proc_DA="1")
    runs.wait_for("worker", "Epoch 1")
    children = children_of(process.pid)
    started = time.monotonic()
    for child in children:
        if b"faulty.py" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(child, signal.SIGKILL)
    runs.finish(process, "worker", status=1)
    assert time.monotonic() - started < 60
    assert "a worker was killed" in runs.output("worker").splitlines()[-1]


def test_killed_at_random_moments(runs: Runs, tmp_path: Path) -> None:
    script = ROOT / "experiments" / "kill_and_resume.py"
    command = [sys.executable, str(script), NAME, "3d_fullres", "0", "--kills", "3", "--work", str(tmp_path / "kills")]
    settings = f"{SETTINGS},save_minutes=0.000001,pretraining.epochs=20".replace("pretraining.epochs=3,", "")
    done = subprocess.run(
        command, env={**runs.environment("unused", ""), "nnUNet_hyspark": settings}, cwd=tmp_path, text=True,
        capture_output=True, timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["kills"] == 3 and summary["runs_equal"] == summary["runs_finished"] > 0


def test_plain_torch_can_read_a_checkpoint_of_several_processes(runs: Runs) -> None:
    runs.finish(runs.start("two", processes=2, settings="pretraining.epochs=1"), "two")
    weights = torch.load(runs.fold("two") / FINAL, weights_only=True)["network_weights"]
    assert not any(name.startswith("module.") for name in weights)
