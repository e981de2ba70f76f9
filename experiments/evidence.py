"""Writes docs/evidence.md and its plots from the results of the studies.

    python experiments/evidence.py experiments/results/*.json
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy.stats import wilcoxon

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DOCS = Path(__file__).parent.parent / "docs"
HEADER = """# Evidence: does pre-training help?

Tables and plots are written by `python experiments/evidence.py experiments/results/*.json` from the results that
`experiments/study.py` stored; [experiments/README.md](../experiments/README.md) has the command of every study. From
"How to read this" on, people write ([evidence_notes.md](evidence_notes.md)).

Dice in percent, mean over the validation cases and structures, then over seeds (in brackets the standard deviation
over seeds). HD95: 95th percentile of the surface distance, mm, over cases where both masks have voxels. p: two-sided
Wilcoxon signed-rank test over validation cases, each case's Dice averaged over seeds. An arm is compared with
`{baseline}`, or with what the study's file names as its `baselines`, over the seeds that both have; Dice is over all
that an arm has. Level: the first epoch whose pseudo-Dice on validation patches, averaged over seeds, is at least the
baseline's at its end. Linear probe: Dice of a linear classifier on the frozen encoder's features, all scales together,
fitted on half of `2 * probe_cases` labelled crops of `probe_dataset` and tested on the other half, while pre-training
goes on.
"""
BASELINE = "scratch"


def mean_dice(piece: dict[str, Any]) -> dict[str, float]:
    """Per case, the mean over structures that are there, percent."""
    return {
        name: 100 * float(np.nanmean([np.nan if d is None else d for d in case["dice"].values()]))
        for name, case in piece["cases"].items()
    }


def per_structure(pieces: list[dict[str, Any]], metric: str, factor: float = 1.0) -> dict[str, float]:
    """Mean over cases and seeds by label."""
    values: dict[str, list[float]] = {}
    for piece in pieces:
        for case in piece["cases"].values():
            for label, value in case[metric].items():
                if value is not None and np.isfinite(value):
                    values.setdefault(label, []).append(factor * value)
    return {label: float(np.mean(numbers)) for label, numbers in sorted(values.items())}


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> tuple[float, float]:
    """Difference in points, and its p value over the cases that both have, over the seeds that both have."""
    seeds = {p["seed"] for p in ours} & {p["seed"] for p in theirs}
    sides = []
    for pieces in (ours, theirs):
        dice = [mean_dice(p) for p in pieces if p["seed"] in seeds]
        sides.append({case: float(np.mean([d[case] for d in dice])) for case in dice[0]})
    difference = np.array([sides[0][case] - sides[1][case] for case in sides[0]])
    p = wilcoxon(difference).pvalue if np.any(difference) else 1.0
    return float(difference.mean()), float(p)


def comparison(name: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]], steps_per_epoch: int) -> str:
    """Difference to a baseline's pieces in words, empty where there is no common seed."""
    seeds = {piece["seed"] for piece in ours} & {piece["seed"] for piece in theirs}
    if not seeds:
        return ""
    points, p = compare(ours, theirs)
    common = [[piece for piece in pieces if piece["seed"] in seeds] for pieces in (ours, theirs)]
    ends = curve(common[1])
    above = np.nonzero(curve(common[0]) >= ends[-1])[0]
    when = f"after {(above[0] + 1) * steps_per_epoch} steps of" if len(above) else "never in"
    return f"{name}: {points:+.1f} (p {p:.2g}), level {when} {len(ends) * steps_per_epoch}"


def curve(pieces: Iterable[dict[str, Any]]) -> np.ndarray:
    """Pseudo-Dice after every epoch, mean over seeds, percent."""
    curves = [piece["curve"] for piece in pieces]
    length = min(map(len, curves))
    return 100 * np.nanmean([c[:length] for c in curves], axis=0)


def plot_curves(study: dict[str, Any], groups: dict[tuple[str, int], list[dict[str, Any]]], counts: list[int]) -> str:
    """Learning curves, a panel per number of labelled cases; returns the file's name.

    Arms that are in one panel alone are thin.
    """
    panels = {arm: sum((arm, count) in groups for count in counts) for arm in study["arms"]}
    shown = [arm for arm in study["arms"] if panels[arm]]
    most = max(panels.values())
    columns = min(3, len(counts))
    rows, legend_rows = math.ceil(len(counts) / columns), math.ceil(len(shown) / 2)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4 * columns, 3 * rows + 0.2 * legend_rows), squeeze=False, sharex=True, sharey=True,
        layout="constrained",
    )
    colours = plt.get_cmap("tab20" if len(shown) > 10 else "tab10")
    lines = {}
    for axis, count in zip(axes.flat, counts):
        for number, arm in enumerate(shown):
            if (arm, count) in groups:
                values = curve(groups[arm, count])
                steps = study["finetuning"]["iterations_per_epoch"] * np.arange(1, len(values) + 1)
                width, order = (0.7, 2) if panels[arm] == 1 < most else (1.8, 3)
                (lines[arm],) = axis.plot(steps, values, color=colours(number), linewidth=width, zorder=order)
        axis.set_title(f"{count} labelled cases")
        axis.set_xlabel("steps")
        axis.tick_params(labelbottom=True)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(counts) :]:
        axis.set_axis_off()
    for row in axes:
        row[0].set_ylabel("pseudo-Dice, %")
    figure.legend([lines[arm] for arm in shown], shown, loc="outside lower center", ncols=2, fontsize=8)
    name = f"figures/evidence_{study['name']}.png"
    figure.savefig(DOCS / name, dpi=110)
    plt.close(figure)
    return name


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


def with_its_study(results: dict[str, Any]) -> dict[str, Any]:
    """Results with what the study's file says now of the tables: their text, structures, the arms' order and baselines.
    What was trained is told by the copy that was stored with the pieces."""
    file = Path(__file__).parent / "studies" / f"{results.get('study', {}).get('name')}.json"
    if not file.is_file():
        return results
    stored, present = results["study"], json.loads(file.read_text(encoding="utf-8"))
    arms = {
        arm: {**stored["arms"].get(arm, options), **{k: v for k, v in options.items() if k == "baselines"}}
        for arm, options in present["arms"].items()
    }
    texts = {key: present[key] for key in ("table", "structures") if key in present}
    return {**results, "study": {**stored, **texts, "arms": arms}}


def section(results: dict[str, Any]) -> list[str]:
    """A study's table, costs and plot."""
    study, machine = results["study"], results["machine"]
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for piece in results["pieces"]:
        if piece["arm"] in study["arms"]:
            groups.setdefault((piece["arm"], piece["labelled_cases"]), []).append(piece)
    counts = sorted({count for _, count in groups})
    seconds = sum(p["seconds"] for p in results["pieces"]) + sum(p["seconds"] for p in results["pretraining"].values())
    lines = [
        f"## {study['name']}", "", study["table"], "",
        f"    python experiments/study.py experiments/studies/{study['name']}.json --work FOLDER", "",
        f"{machine['processors']} processors, {study['device']}; torch {machine['torch']}, nnunetv2 "
        f"{machine['nnunetv2']}, nnunetv2-hyspark {machine['nnunetv2-hyspark']}, Python {machine['python']}; "
        f"{seconds / 3600:.1f} hours in all.", "",
    ]
    if study.get("structures"):
        lines += [f"Structures, in this order: {', '.join(study['structures'])}.", ""]
    finished = results["pretraining"]
    lines += pretraining_table({name: finished[name] for name in study["pretraining"] if name in finished})
    lines += losses_of_trainers(study, finished)
    if not study["arms"]:
        return lines
    lines += [
        "| labelled cases | arm | Dice | against | by structure | HD95, mm | seeds | minutes | of pre-training |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for count in counts:
        for arm, options in study["arms"].items():
            pieces = groups.get((arm, count))
            if not pieces:
                continue
            dice = [float(np.mean(list(mean_dice(p).values()))) for p in pieces]
            spread = f" ({np.std(dice, ddof=1):.1f})" if len(dice) > 1 else ""
            against = [
                comparison(name, pieces, groups.get((name, count), []), study["finetuning"]["iterations_per_epoch"])
                for name in options.get("baselines", [BASELINE])
                if name != arm
            ]
            structures = ", ".join(f"{v:.1f}" for v in per_structure(pieces, "dice", 100).values())
            hd95 = ", ".join(f"{v:.1f}" for v in per_structure(pieces, "hd95").values())
            minutes = float(np.mean([p["seconds"] for p in pieces])) / 60
            differences = "<br>".join(filter(None, against))
            before = finished.get(options.get("weights"))
            seeds = ", ".join(str(seed) for seed in sorted(p["seed"] for p in pieces))
            pretraining = f"{before['seconds'] / 60:.0f}" if before else ""
            lines.append(
                f"| {count} | {arm} | {np.mean(dice):.1f}{spread} | {differences} | {structures} | {hd95} | "
                f"{seeds} | {minutes:.1f} | {pretraining} |"
            )
    settings = ", ".join(f"{key}={value}" for key, value in study["finetuning"].items())
    lines += ["", f"All arms: {settings}. Network: {json.dumps(study['architecture'])}.", "", "Per arm:", ""]
    shown = {arm for arm, _ in groups}
    lines += [f"- `{arm}`: {json.dumps(options)}" for arm, options in study["arms"].items() if arm in shown]
    if groups:
        lines += ["", f"![Learning curves]({plot_curves(study, groups, counts)})", ""]
    return lines


def shift_section(results: dict[str, Any]) -> list[str]:
    """What `feature_shift.py` measured."""
    scales = len(results["rows"][0]["shares"])
    lines = [
        "## How far features move when the rest of the image is hidden", "",
        "    python experiments/feature_shift.py --images IMAGES --checkpoints NAME=FILE ...", "",
        "IMAGES: the first files of the hippocampus folder; FILE: `checkpoint_final.pth` of the pre-training NAME.",
        "",
        f"Squared change of the features of visible voxels between a whole and a masked image, over their variance, by "
        f"scale, finest first; {results['images']} images, checkpoints of `hippocampus_cpu_masking`. A share of 1 says "
        f"that hiding changes a feature as much as another place in another image does.", "",
        "| " + " | ".join(["network", "hidden", "hidden neighbours", *(f"scale {n}" for n in range(scales))]) + " |",
        "|---" * (3 + scales) + "|",
    ]
    for row in results["rows"]:
        shares = " | ".join(f"{share:.2f}" for share in row["shares"])
        lines.append(f"| {row['network']} | {row['ratio']:.0%} | {row['filling']} | {shares} |")
    return [*lines, ""]


def cost_section(benchmarks: list[dict[str, Any]]) -> list[str]:
    """What a pre-training step of the paper's network takes, by decoder and by way to compute it."""
    steps = [b for b in benchmarks if "step" in b and "memory_gb" in b]
    if not steps:
        return []
    lines = [
        "## What a step costs", "",
        "From [benchmarks.md](benchmarks.md), which has the machine and the commands: a whole pre-training step of the "
        "paper's network on one crop, three quarters hidden. The ways compute the same: the last column is their "
        "largest relative difference in the loss, in the reconstruction, and in the encoder's gradients.", "",
        "| decoder | crop | blocks, s | dense-then-mask | official-like | GB, blocks | GB, dense | differences |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for benchmark in steps:
        request, step, memory = benchmark["request"], benchmark["step"], benchmark["memory_gb"]
        name = {
            "default": "the default, 256 wide", "official": "768 wide, as the release's",
            "segmentation": "the segmentation network's",
        }[request["step"]]
        if width := request["step"] == "default" and request.get("settings", {}).get("decoder_width"):
            name = f"{width} wide"
        differences = [max(values.values()) for values in benchmark["relative_differences"].values()]
        lines.append(
            f"| {name} | {'x'.join(map(str, request['size']))} | {step['blocks']['median_s']:.2f} | "
            f"{step['dense']['ratio_to_blocks']:.2f} x | {step['official-like']['ratio_to_blocks']:.2f} x | "
            f"{memory['blocks']:.2f} | {memory['dense']:.2f} | {', '.join(f'{d:.0e}' for d in differences)} |"
        )
    return [*lines, ""]


def main() -> None:
    """Reads the files named on the command line."""
    if len(sys.argv) < 2:
        raise SystemExit("give the JSON files of experiments/results")
    lines = [HEADER.format(baseline=BASELINE)]
    for name in sys.argv[1:]:
        results = with_its_study(json.loads(Path(name).read_text(encoding="utf-8")))
        lines += section(results) if "study" in results else shift_section(results)
    benchmarks = sorted((DOCS / "figures").glob("benchmark_*.json"))
    lines += cost_section([json.loads(file.read_text(encoding="utf-8")) for file in benchmarks])
    notes = DOCS / "evidence_notes.md"
    if notes.exists():
        lines += ["", notes.read_text(encoding="utf-8")]
    (DOCS / "evidence.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
