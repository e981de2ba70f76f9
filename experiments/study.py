"""Runs a study: pre-trainings, then trainings of every arm on every subset with every seed, by public commands alone.

    python experiments/study.py experiments/studies/hippocampus_cpu.json --work FOLDER [--minutes 8] [--arms scratch]

The study's file says what is trained; see experiments/README.md. Every training is a piece: a finished one is never
repeated, an interrupted one goes on, and after ``--minutes`` the one that runs is told to save and stop, so that a
study can be run in several goes; ``--arms``, ``--folds`` and ``--seeds`` leave the others to another process beside
this one.
Results are added to experiments/results/NAME.json as they come. ``nnUNet_raw`` and ``nnUNet_preprocessed`` as always;
FOLDER takes the results and the logs.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scores import probe_dice, score_validation, training_seconds, validation_losses

HERE = Path(__file__).parent
YEAR = 365 * 24 * 3600.0


@dataclass(frozen=True)
class Study:
    """What a study's file holds.

    Attributes:
        name: of the results' file.
        pile, labelled: numbers of the two data sets; the labelled one's folds are its subsets.
        plan: arguments of ``nnUNetv2_plan_and_preprocess``.
        architecture: settings of the network, fixed when it is planned.
        plan_edit: values that replace those of configuration 3d_fullres in HySparK's plans of both data sets.
        pretraining: named pre-trainings, each with its settings; those that no arm names are run if there are no arms.
        finetuning: settings of every supervised training.
        arms: per arm ``trainer``, and where they apply ``weights`` (name of a pre-training), ``settings`` (added to
            ``finetuning``), ``plans`` and ``environment``; ``baselines`` names the arms to compare with.
        folds, seeds: which subsets, and how often.
        device: ``cpu`` or ``cuda``.
        other_plans: further plans of the labelled data set: per name ``arguments`` of ``nnUNetv2_plan_experiment``, and
            ``edit``, values that replace those of configuration 3d_fullres.
        structures: names of labels 1, 2, ..., for the tables.
        pretraining_trainers: trainers of those pre-trainings that are not HySparKPretrainTrainer's.
        plans: name of HySparK's plans, another one where studies of the same data sets have other networks.
    """

    name: str
    pile: int
    labelled: int
    plan: list[str]
    architecture: dict[str, Any]
    pretraining: dict[str, dict[str, Any]]
    finetuning: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    folds: list[int]
    seeds: list[int]
    device: str = "cpu"
    other_plans: dict[str, dict[str, Any]] = field(default_factory=dict)
    plan_edit: dict[str, Any] = field(default_factory=dict)
    table: str = ""
    structures: list[str] = field(default_factory=list)
    pretraining_trainers: dict[str, str] = field(default_factory=dict)
    plans: str = "nnUNetHySparKPlans"


def edit_plans(file: Path, values: dict[str, Any]) -> None:
    """Replaces values of configuration 3d_fullres, or of its network's arguments where they have that name."""
    plans = json.loads(file.read_text(encoding="utf-8"))
    configuration = plans["configurations"]["3d_fullres"]
    architecture = configuration["architecture"]["arch_kwargs"]
    for key, value in values.items():
        (architecture if key in architecture else configuration)[key] = value
    file.write_text(json.dumps(plans, indent=2), encoding="utf-8")


class Runner:
    """Runs the pieces of a study.

    Args:
        study: what to run.
        minutes: no piece is begun after so many, and the one that runs is stopped.
        arms, folds, seeds: which of the study's.
    """

    def __init__(
        self, study: Study, work: Path, minutes: float, arms: list[str], folds: list[int], seeds: list[int]
    ):
        self.study, self.work, self.arms, self.folds, self.seeds = study, work, arms, folds, seeds
        self.until = time.monotonic() + 60 * minutes
        self.file = HERE / "results" / f"{study.name}.json"

    def read(self) -> dict[str, Any]:
        """What is known so far, of this process and of others."""
        results: dict[str, Any] = {"study": {}, "pretraining": {}, "pieces": []}
        if self.file.exists():
            results.update(json.loads(self.file.read_text(encoding="utf-8")))
        return {**results, "study": self.study.__dict__}

    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.until

    @contextmanager
    def changed(self) -> Iterator[dict[str, Any]]:
        """The results, to be added to: one process at a time, and a reader never sees half a file."""
        self.file.parent.mkdir(exist_ok=True)
        with self.file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            results = self.read()
            yield results
            results["machine"] = {
                "processors": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "nnunetv2", "nnunetv2-hyspark")},
            }
            partial = self.file.with_suffix(".partial")
            partial.write_text(json.dumps(results, indent=1), encoding="utf-8")
            partial.replace(self.file)

    def command(
        self,
        log: Path,
        *command: str,
        settings: dict[str, Any] | None = None,
        can_stop: bool = False,
        **environment: str,
    ) -> bool:
        """Runs a command with its output in a log; False if it ``can_stop`` and was stopped, because the time was up.

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
                status = process.wait(max(0.0, min(self.until - time.monotonic(), YEAR)) if can_stop else None)
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait()
                return False
            except BaseException:  # Ctrl-C and SIGTERM end both
                process.terminate()
                process.wait()
                raise
            finally:
                with suppress(ProcessLookupError):  # nnU-Net's own trainer leaves its workers behind when it is ended
                    os.killpg(process.pid, signal.SIGKILL)
        if status:
            raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text(encoding='utf-8')[-2000:]}")
        return True

    def preprocessed(self, number: int) -> Path:
        """Folder of a preprocessed data set."""
        return next(Path(os.environ["nnUNet_preprocessed"]).glob(f"Dataset{number:03d}_*"))

    def prepare(self) -> None:
        """Plans and preprocesses both data sets, unless that is done."""
        for number in (self.study.pile, self.study.labelled):
            folders = list(Path(os.environ["nnUNet_preprocessed"]).glob(f"Dataset{number:03d}_*"))
            if not any((folder / f"{self.study.plans}.json").exists() for folder in folders):
                self.command(
                    self.work / "logs" / f"plan_{number}.txt", "nnUNetv2_plan_and_preprocess", "-d", str(number), "-pl",
                    "HySparKPlanner", "-c", "3d_fullres", "-overwrite_plans_name", self.study.plans, *self.study.plan,
                    settings=self.study.architecture,
                )
                edit_plans(self.preprocessed(number) / f"{self.study.plans}.json", self.study.plan_edit)
        for name, plan in self.study.other_plans.items():
            file = self.preprocessed(self.study.labelled) / f"{name}.json"
            if not file.exists():
                self.command(
                    self.work / "logs" / f"plan_{name}.txt", "nnUNetv2_plan_experiment", "-d",
                    str(self.study.labelled), *plan["arguments"], "-overwrite_plans_name", name,
                )
                edit_plans(file, plan["edit"])

    def train(self, folder: Path, log: Path, number: int, fold: str, *more: str, **keywords: Any) -> Path | None:
        """One training, gone on with if it was interrupted; returns its folder, or None if the time is up."""
        found = list(folder.glob(f"Dataset{number:03d}_*/*/fold_{fold}"))
        if not (found and (found[0] / "validation" / "summary.json").exists()):
            if self.is_over():
                return None
            weights = more
            is_trained = bool(found) and (found[0] / "checkpoint_final.pth").exists()  # its validation is one piece
            if found and any(found[0].glob("checkpoint_*.pth")):
                weights = tuple(word for word in more if word != "-pretrained_weights" and not word.endswith(".pth"))
                weights = (*weights, "--c")
            folder.mkdir(parents=True, exist_ok=True)
            finished = self.command(
                log, "nnUNetv2_train", str(number), "3d_fullres", fold, "-device", self.study.device, *weights,
                can_stop=not is_trained, nnUNet_results=str(folder), **keywords,
            )
            if not finished:
                return None
        return next(folder.glob(f"Dataset{number:03d}_*/*/fold_{fold}"))

    def pretrain(self, name: str) -> Path | None:
        """One pre-training; returns its checkpoint, or None if the time is up."""
        settings = {"pretraining": self.study.pretraining[name]}
        folder = self.train(
            self.work / "pretraining" / name, self.work / "logs" / f"pretraining_{name}.txt", self.study.pile, "all",
            "-tr", self.study.pretraining_trainers.get(name, "HySparKPretrainTrainer"), "-p", self.study.plans,
            settings=settings, nnUNet_extTrainer=str(HERE / "trainers"),
        )
        if folder is None:
            return None
        if name not in self.read()["pretraining"]:
            summary = json.loads((folder / "validation" / "summary.json").read_text(encoding="utf-8"))
            with self.changed() as results:
                results["pretraining"][name] = {
                    "settings": self.study.pretraining[name],
                    "seconds": training_seconds(folder),
                    "summary": summary["mean"],
                    "probe": probe_dice(folder),
                    "losses": validation_losses(folder),
                }
        return folder / "checkpoint_final.pth"

    def piece(self, arm: str, fold: int, seed: int) -> bool:
        """One training of an arm; False if the time is up."""
        if any((p["arm"], p["fold"], p["seed"]) == (arm, fold, seed) for p in self.read()["pieces"]):
            return True
        options = self.study.arms[arm]
        more = ["-tr", options["trainer"], "-p", options.get("plans", self.study.plans)]
        if "weights" in options:
            checkpoint = self.pretrain(options["weights"])
            if checkpoint is None:
                return False
            more += ["-pretrained_weights", str(checkpoint)]
        settings = {"finetuning": {**self.study.finetuning, **options.get("settings", {}), "seed": seed}}
        folder = self.train(
            self.work / "arms" / arm / f"seed_{seed}", self.work / "logs" / f"{arm}_{fold}_{seed}.txt",
            self.study.labelled, str(fold), *more, settings=settings,
            nnUNet_extTrainer=str(HERE / "trainers"), **options.get("environment", {}),
        )
        if folder is None:
            return False
        cases = json.loads((self.preprocessed(self.study.labelled) / "splits_final.json").read_text(encoding="utf-8"))
        scores = score_validation(folder)
        with self.changed() as results:
            results["pieces"].append(
                {"arm": arm, "fold": fold, "seed": seed, "labelled_cases": len(cases[fold]["train"]), **scores}
            )
        return True

    def run(self) -> bool:
        """Every piece, seed by seed; False if the time was up before the end."""
        self.prepare()
        if not self.study.arms:
            return all(self.pretrain(name) is not None for name in self.study.pretraining)
        return all(
            self.piece(arm, fold, seed)
            for seed in self.seeds
            for fold in self.folds
            for arm in self.arms
        )


def main() -> None:
    """Runs a study or a part of it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--arms", nargs="+", help="default: all")
    parser.add_argument("--folds", nargs="+", type=int, help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: all")
    arguments = parser.parse_args()
    study = Study(**json.loads(arguments.study.read_text(encoding="utf-8")))
    arms = arguments.arms or list(study.arms)
    if unknown := [arm for arm in arms if arm not in study.arms]:
        parser.error(f"--arms names {', '.join(unknown)}; the study has {', '.join(study.arms)}.")
    numbers = {"folds": arguments.folds or study.folds, "seeds": arguments.seeds or study.seeds}
    for name, chosen in numbers.items():
        known = getattr(study, name)
        if strange := [str(number) for number in chosen if number not in known]:
            parser.error(f"--{name} names {', '.join(strange)}; the study has {', '.join(map(str, known))}.")
    finished = Runner(study, arguments.work.resolve(), arguments.minutes, arms, **numbers).run()
    print(f"{study.name}: " + ("finished" if finished else "to be gone on with, by the same command"))


if __name__ == "__main__":
    main()
