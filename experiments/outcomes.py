"""What a study's results hold, sorted for tables and plots."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_hyspark.training.finetuning import FinetuningConfig

BASELINE = "scratch"
"""The arm that others are compared with unless they name ``baselines``."""


@dataclass(frozen=True)
class Outcome:
    """A study and what came of it.

    Attributes:
        study: the study's file, as it was stored with the results.
        machine: what it ran on.
        pretraining: finished pre-trainings by key.
        groups: trainings of the study's arms, by arm and fold, one per seed.
        labelled: fold -> number of labelled cases, smallest first, of the folds that were run.
    """

    study: dict[str, Any]
    machine: dict[str, Any]
    pretraining: dict[str, dict[str, Any]]
    groups: dict[tuple[str, int], list[dict[str, Any]]]
    labelled: dict[int, int]

    @classmethod
    def of(cls, results: dict[str, Any]) -> Outcome:
        """From a results' file; trainings of arms that the study no longer has are left out."""
        study = results["study"]
        groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for piece in results["pieces"]:
            if piece["arm"] in study["arms"]:
                groups.setdefault((piece["arm"], piece["fold"]), []).append(piece)
        sizes = {fold: pieces[0]["labelled_cases"] for (_, fold), pieces in groups.items()}
        labelled = {fold: sizes[fold] for fold in sorted(sizes, key=lambda fold: (sizes[fold], fold))}
        return cls(study, results["machine"], results["pretraining"], groups, labelled)

    @property
    def steps_per_epoch(self) -> int:
        """Of its fine-tunings."""
        return int(self.study["finetuning"].get("iterations_per_epoch", FinetuningConfig().iterations_per_epoch))

    @property
    def seconds(self) -> float:
        """All its trainings took, pre-trainings included."""
        trainings = (piece for pieces in self.groups.values() for piece in pieces)
        return float(sum(run["seconds"] for run in [*trainings, *self.pretraining.values()]))

    def pieces(self, arm: str, fold: int) -> list[dict[str, Any]]:
        """Trainings of an arm on a subset; none if it was not run."""
        return self.groups.get((arm, fold), [])

    def baselines(self, arm: str) -> list[str]:
        """The arms that an arm is compared with."""
        return [name for name in self.study["arms"][arm].get("baselines", [BASELINE]) if name != arm]

    def columns(self) -> Iterator[tuple[int, str]]:
        """Folds and their headings: the number of labelled cases, with the fold where two have as many."""
        sizes = list(self.labelled.values())
        for fold, size in self.labelled.items():
            yield fold, f"{size}" if sizes.count(size) == 1 else f"{size}, fold {fold}"


def read_results(file: Path, studies: Path | None = None) -> dict[str, Any]:
    """A results' file; where ``studies`` is given, with what the study's file there says now of the tables: their text,
    structures, headline, the arms' order and baselines. What was trained is told by the copy that was stored."""
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    name = results.get("study", {}).get("name")
    if studies is None or not (studies / f"{name}.json").is_file():
        return results
    stored, present = results["study"], json.loads((studies / f"{name}.json").read_text(encoding="utf-8"))
    arms = {
        arm: {**stored["arms"].get(arm, options), **{k: v for k, v in options.items() if k == "baselines"}}
        for arm, options in present["arms"].items()
    }
    texts = {key: present[key] for key in ("table", "structures", "headline") if key in present}
    return {**results, "study": {**stored, **texts, "arms": arms}}
