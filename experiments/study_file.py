"""What a study's file holds."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any


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
        other_plans: further plans: per name ``arguments`` of ``nnUNetv2_plan_experiment``, ``edit``, values that
            replace those of configuration 3d_fullres, and where they apply ``architecture``, settings of the network
            that are added to the study's, ``of``: ``pile``, for plans of that data set instead of the labelled one, and
            ``like_the_other``: true, for images normalised by the other data set's intensities; for the labelled one
            ``hyspark plan-finetune`` plans so.
        structures: names of labels 1, 2, ..., for the tables.
        headline: arms for the table at a glance, and what they are called there.
        pretraining_trainers: trainers of those pre-trainings that are not HySparKPretrainTrainer's.
        pretraining_plans: names of ``other_plans``, of those pre-trainings that do not use ``plans``.
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
    headline: dict[str, str] = field(default_factory=dict)
    pretraining_trainers: dict[str, str] = field(default_factory=dict)
    pretraining_plans: dict[str, str] = field(default_factory=dict)
    plans: str = "nnUNetHySparKPlans"

    @classmethod
    def read(cls, file: Path) -> Study:
        """From JSON.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no JSON, or has other keys than a study.
        """
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is no JSON ({error}); correct it there.") from None
        known = {item.name: item for item in fields(cls)}
        needed = {name for name, item in known.items() if item.default is MISSING and item.default_factory is MISSING}
        unknown, missing = sorted(set(found) - set(known)), sorted(needed - set(found))
        if unknown or missing:
            raise ValueError(
                f"{file} lacks the key(s) {', '.join(missing) or 'none'} and has the unknown key(s) "
                f"{', '.join(unknown) or 'none'}; expected those of experiments/README.md."
            )
        return cls(**found)
