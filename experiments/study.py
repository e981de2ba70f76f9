"""Runs a study: pre-trainings, then trainings of every arm on every subset with every seed, by public commands alone.

    python experiments/study.py experiments/studies/hippocampus_cpu.json --work WORK [--minutes 8] [--arms scratch]

The study's file says what is trained; see experiments/README.md. Every training is a piece: a finished one is never
repeated, an interrupted one goes on, and after ``--minutes`` the one that runs is told to save and stop, so that a
study can be run in several goes. Several processes may run a study beside each other: each takes pieces that no other
works on. ``--arms``, ``--folds`` and ``--seeds`` choose among them.
WORK, one per study, takes checkpoints, logs and, as they come, ``results/NAME.json``. A study whose settings, plans
or splits were changed since is refused. ``nnUNet_raw`` and ``nnUNet_preprocessed`` as always.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import commands
from preparation import prepare, preprocessed
from records import Results, claim, commit, commits_of, exclusive
from scores import probe_dice, score_validation, training_seconds, validation_losses
from study_file import Study

from nnunetv2_hyspark.planning.remembered import file_digest

HERE = Path(__file__).parent


class Runner:
    """Runs the pieces of a study.

    Args:
        study: what to run.
        work: folder for checkpoints and logs.
        results: folder for the results' file.
        minutes: no piece is begun after so many, and the one that runs is stopped.
        arms, folds, seeds: which of the study's.
    """

    def __init__(
        self, study: Study, work: Path, results: Path, minutes: float, arms: list[str], folds: list[int],
        seeds: list[int],
    ):
        self.study, self.work, self.arms, self.folds, self.seeds = study, work, arms, folds, seeds
        self.until = time.monotonic() + 60 * minutes
        with exclusive(work / ".lock"):
            claim(work / "study.json", {"name": study.name}, is_begun=True)
        self.commit = commit()
        self.results = Results(results / f"{study.name}.json", study)

    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.until

    def train(
        self, folder: Path, log: Path, number: int, fold: str, *more: str, settings: dict[str, Any],
        weights: Path | None = None, environment: dict[str, str] | None = None,
    ) -> Path | None:
        """One training, gone on with if it was interrupted; returns its folder, or None if the time is up.

        Args:
            folder: ``nnUNet_results`` of it.
            log: for its output.
            number: of its data set.
            fold: ``all`` or a number.
            more: trainer and plans, as arguments of ``nnUNetv2_train``.
            settings: for ``nnUNet_hyspark``.
            weights: checkpoint that it starts from.
            environment: further variables.

        Raises:
            ValueError: if the folder holds one that was begun otherwise.
            RuntimeError: if it fails.
        """
        found = list(folder.glob(f"Dataset{number:03d}_*/*/fold_{fold}"))
        plans = preprocessed(number) / f"{more[more.index('-p') + 1]}.json"
        request = {
            "arguments": list(more), "settings": settings, "environment": environment or {},
            "weights": file_digest(weights) if weights else None, "dataset": number, "plans": file_digest(plans),
        }
        if fold != "all":
            splits = preprocessed(number) / "splits_final.json"
            request["cases"] = json.loads(splits.read_text(encoding="utf-8"))[int(fold)]
        claim(folder / f"request_{fold}.json", request, is_begun=bool(found))
        commits_of(folder / f"commits_{fold}.json", self.commit)
        if not (found and (found[0] / "validation" / "summary.json").exists()):
            if self.is_over():
                return None
            is_trained = bool(found) and (found[0] / "checkpoint_final.pth").exists()  # its validation is one piece
            if found and any(found[0].glob("checkpoint_*.pth")):
                start = ["--c"]
            else:
                start = ["-pretrained_weights", str(weights)] if weights else []
            finished = commands.run(
                log, "nnUNetv2_train", str(number), "3d_fullres", fold, "-device", self.study.device, *more, *start,
                settings=settings, until=None if is_trained else self.until, nnUNet_results=str(folder),
                nnUNet_extTrainer=str(HERE / "trainers"), **(environment or {}),
            )
            if not finished:
                return None
        return next(folder.glob(f"Dataset{number:03d}_*/*/fold_{fold}"))

    def pretrain(self, name: str, until: float) -> tuple[Path, str] | None:
        """One pre-training, by one process at a time; returns its checkpoint and its key among the results, or None if
        the time is up, or another process works on it ``until`` then."""
        folder = self.work / "pretraining" / name
        with exclusive(folder / ".lock", until) as is_ours:
            if not is_ours:
                return None
            trained = self.train(
                folder, self.work / "logs" / f"pretraining_{name}.txt", self.study.pile, "all",
                "-tr", self.study.pretraining_trainers.get(name, "HySparKPretrainTrainer"),
                "-p", self.study.pretraining_plans.get(name, self.study.plans),
                settings={"pretraining": self.study.pretraining[name]},
            )
            if trained is None:
                return None
            summary = json.loads((trained / "validation" / "summary.json").read_text(encoding="utf-8"))
            checkpoint = trained / "checkpoint_final.pth"
            key = self.results.add_pretraining(name, file_digest(checkpoint), {
                "settings": self.study.pretraining[name],
                "seconds": training_seconds(trained),
                "summary": summary["mean"],
                "probe": probe_dice(trained),
                "losses": validation_losses(trained),
                "commits": commits_of(folder / "commits_all.json"),
            })
        return checkpoint, key

    def piece(self, arm: str, fold: int, seed: int, wait: bool = True) -> bool:
        """One training of an arm; False if the time is up, or another process works on it, or on what it starts from,
        and we do not ``wait``."""
        folder = self.work / "arms" / arm / f"seed_{seed}"
        until = self.until if wait else 0.0
        with exclusive(folder / f".lock_{fold}", until) as is_ours:
            if not is_ours:
                return False
            if self.results.has(arm, fold, seed):
                return True
            options = self.study.arms[arm]
            checkpoint, pretraining = None, {}
            if "weights" in options:
                made = self.pretrain(options["weights"], until)
                if made is None:
                    return False
                checkpoint, pretraining = made[0], {"pretraining": made[1]}
            trained = self.train(
                folder, self.work / "logs" / f"{arm}_{fold}_{seed}.txt", self.study.labelled, str(fold),
                "-tr", options["trainer"], "-p", options.get("plans", self.study.plans),
                settings={"finetuning": {**self.study.finetuning, **options.get("settings", {}), "seed": seed}},
                weights=checkpoint, environment=options.get("environment"),
            )
            if trained is None:
                return False
            cases = json.loads((folder / f"request_{fold}.json").read_text(encoding="utf-8"))["cases"]
            self.results.add_piece({
                "arm": arm, "fold": fold, "seed": seed, "labelled_cases": len(cases["train"]), **pretraining,
                "commits": commits_of(folder / f"commits_{fold}.json"), **score_validation(trained),
            })
        return True

    def run(self) -> bool:
        """Every piece, seed by seed, those that other processes work on last; False if the time was up before the
        end."""
        prepare(self.study, self.work / "logs")
        self.results.expect_splits(file_digest(preprocessed(self.study.labelled) / "splits_final.json"))
        if not self.study.arms:
            return all(self.pretrain(name, self.until) is not None for name in self.study.pretraining)
        pieces = [(arm, fold, seed) for seed in self.seeds for fold in self.folds for arm in self.arms]
        left = [piece for piece in pieces if not self.piece(*piece, wait=False)]
        return all(self.piece(*piece) for piece in left)


def main() -> None:
    """Runs a study or a part of it."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument("--results", type=Path, help="folder for the results; default: results, in that of --work")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--arms", nargs="+", help="default: all")
    parser.add_argument("--folds", nargs="+", type=int, help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: all")
    arguments = parser.parse_args()
    try:
        study = Study.read(arguments.study)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    arms = arguments.arms or list(study.arms)
    if unknown := [arm for arm in arms if arm not in study.arms]:
        parser.error(f"--arms names {', '.join(unknown)}; the study has {', '.join(study.arms)}.")
    numbers = {"folds": arguments.folds or study.folds, "seeds": arguments.seeds or study.seeds}
    for name, chosen in numbers.items():
        known = getattr(study, name)
        if strange := [str(number) for number in chosen if number not in known]:
            parser.error(f"--{name} names {', '.join(strange)}; the study has {', '.join(map(str, known))}.")
    work = arguments.work.resolve()
    results = (arguments.results or work / "results").resolve()
    try:
        finished = Runner(study, work, results, arguments.minutes, arms, **numbers).run()
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        sys.exit(str(error))
    print(f"{study.name}: " + ("finished" if finished else "to be gone on with, by the same command"))


if __name__ == "__main__":
    main()
