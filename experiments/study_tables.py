"""Markdown of a study's results: its best arms at a glance, and everything that was run."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from comparisons import by_structure, common_seeds, compare, comparison, dice_by_seed, distances
from outcomes import Outcome

SIGNIFICANT = 0.05
"""p value below which a difference is bold at a glance."""


def at_a_glance(outcome: Outcome) -> list[str]:
    """Mean Dice of the arms that the study's file names as its ``headline``, a column per number of labelled cases,
    and the difference to the first of an arm's baselines; nothing for studies that name none."""
    headline = outcome.study.get("headline", {})
    if not headline or not outcome.labelled:
        return []
    columns = dict(outcome.columns())
    lines = [
        f"**`{outcome.study['name']}`**: {outcome.study['table']}", "",
        "| Dice with this many labelled cases | " + " | ".join(columns.values()) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for arm, words in headline.items():
        cells = [_glance(outcome, arm, fold) for fold in columns]
        if any(cells):
            lines.append(f"| {words} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _glance(outcome: Outcome, arm: str, fold: int) -> str:
    """Mean Dice over seeds, the difference to the first baseline, and how many seeds where there are fewer than the
    study has."""
    ours = outcome.pieces(arm, fold)
    if not ours:
        return ""
    notes = []
    for name in outcome.baselines(arm)[:1]:
        theirs = outcome.pieces(name, fold)
        if common_seeds(ours, theirs):
            first, second, p = compare(ours, theirs)
            difference = f"{first - second:+.1f}"
            notes.append(f"**{difference}**" if p < SIGNIFICANT else difference)
    if len(ours) < len(outcome.study["seeds"]):
        notes.append("1 seed" if len(ours) == 1 else f"{len(ours)} seeds")
    in_brackets = f" ({', '.join(notes)})" if notes else ""
    return f"{np.mean(dice_by_seed(ours)):.1f}{in_brackets}"


def in_full(outcome: Outcome) -> list[str]:
    """What was run, on what, in which time, pre-trainings, trainings and their settings."""
    study, machine = outcome.study, outcome.machine
    of_kind = f" ({machine['processor']})" if "processor" in machine else ""
    lines = [
        f"### {study['name']}", "", study["table"], "",
        f"    python experiments/study.py experiments/studies/{study['name']}.json --work WORK", "",
        f"{machine['processors']} processors{of_kind}, {study['device']}; torch {machine['torch']}, nnunetv2 "
        f"{machine['nnunetv2']}, nnunetv2-hyspark {machine['nnunetv2-hyspark']}, Python {machine['python']}; "
        f"{outcome.seconds / 3600:.1f} hours in all.", "",
        *_extent(outcome),
    ]
    if study.get("structures"):
        lines += [f"Structures, in this order: {', '.join(study['structures'])}.", ""]
    lines += pretraining_table(_in_order(outcome))
    lines += losses_of_trainers(study, outcome.pretraining)
    if not study["arms"]:
        return lines
    lines += [
        "| labelled cases | arm | Dice | against | by structure | HD95, mm | seeds | minutes | of pre-training |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for fold, heading in outcome.columns():
        lines += [f"| {heading} | {row} |" for row in _rows(outcome, fold)]
    settings = ", ".join(f"{key}={value}" for key, value in study["finetuning"].items())
    run = {arm for arm, _ in outcome.groups}
    return [
        *lines, "",
        f"All arms: {settings}. Network: {json.dumps(study['architecture'])}.", "",
        "Per arm:", "",
        *(f"- `{arm}`: {json.dumps(options)}" for arm, options in study["arms"].items() if arm in run),
        "",
    ]


def _rows(outcome: Outcome, fold: int) -> list[str]:
    """Of all arms that were trained on a subset, all but the first column."""
    rows = []
    for arm, options in outcome.study["arms"].items():
        pieces = outcome.pieces(arm, fold)
        if not pieces:
            continue
        dice = dice_by_seed(pieces)
        spread = f" ({np.std(dice, ddof=1):.1f})" if len(dice) > 1 else ""
        differences = [
            comparison(name, pieces, outcome.pieces(name, fold), outcome.steps_per_epoch)
            for name in outcome.baselines(arm)
        ]
        used = sorted({piece.get("pretraining", options.get("weights")) for piece in pieces} - {None})
        minutes = [outcome.pretraining[key]["seconds"] / 60 for key in used if key in outcome.pretraining]
        rows.append(" | ".join([
            arm,
            f"{np.mean(dice):.1f}{spread}",
            "<br>".join(filter(None, differences)),
            by_structure(pieces),
            distances(pieces),
            ", ".join(str(seed) for seed in sorted(piece["seed"] for piece in pieces)),
            f"{np.median([piece['seconds'] for piece in pieces]) / 60:.1f}",
            ", ".join(f"{value:.0f}" for value in minutes),
        ]))
    return rows


def _extent(outcome: Outcome) -> list[str]:
    """How many of the trainings that a study's command asks for the tables hold, and what was not run at all."""
    study = outcome.study
    asked = len(study["arms"]) * len(study["folds"]) * len(study["seeds"])
    found = sum(map(len, outcome.groups.values()))
    if not asked or found == asked:
        return []
    run = {arm for arm, _ in outcome.groups}
    missing = ", ".join(f"`{arm}`" for arm in study["arms"] if arm not in run)
    none = f" None of {missing}." if missing else ""
    return [
        f"{found} of the {asked} trainings that the command asks for were run, chosen with `--arms`, `--folds` and "
        f"`--seeds`.{none}", "",
    ]


def _in_order(outcome: Outcome) -> dict[str, dict[str, Any]]:
    """Finished pre-trainings in the order of the study's file; those that it no longer has are left out."""
    order = list(outcome.study["pretraining"])
    named = {key: run.get("name", key) for key, run in outcome.pretraining.items()}
    shown = sorted((key for key in named if named[key] in order), key=lambda key: order.index(named[key]))
    return {key: outcome.pretraining[key] for key in shown}


def pretraining_table(runs: dict[str, dict[str, Any]]) -> list[str]:
    """What the pre-trainings of a study took and gave; settings that all share stand above the table."""
    if not runs:
        return []
    settings = [run["settings"] for run in runs.values()]
    shared = {key: value for key, value in settings[0].items() if all(s.get(key) == value for s in settings)}
    lines = [
        "Pre-training: " + ", ".join(f"{key}={value}" for key, value in shared.items()) + ".", "",
        "| pre-training | settings | minutes | reconstruction loss | linear probe, Dice |", "|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        own = ", ".join(f"{key}={value}" for key, value in run["settings"].items() if key not in shared)
        probe = " → ".join(f"{100 * dice:.1f}" for dice in run.get("probe", [])) or "not asked for"
        lines.append(
            f"| `{name}` | {own} | {run['seconds'] / 60:.0f} | {run['summary']['loss']:.3f} | {probe} |"
        )
    return [*lines, ""]


def losses_of_trainers(study: dict[str, Any], finished: dict[str, dict[str, Any]]) -> list[str]:
    """Validation losses, epoch by epoch, of the pre-trainings of a study that compares trainers, and how far each is
    from the first."""
    trainers = study.get("pretraining_trainers", {})
    if not trainers or not set(study["pretraining"]) <= set(finished):
        return []
    curves = {name: finished[name]["losses"] for name in study["pretraining"]}
    shown = "; ".join(f"`{name}` {', '.join(f'{loss:.4f}' for loss in losses)}" for name, losses in curves.items())
    first, *others = curves
    apart = ", ".join(
        f"`{name}` at most {np.abs(np.subtract(curves[name], curves[first])).max():.4f}" for name in others
    )
    trained = ", ".join(f"`{name}` by `{trainer}`" for name, trainer in trainers.items())
    return [f"Trained {trained}. Validation losses, epoch by epoch: {shown}. From `{first}`: {apart}.", ""]
