"""Writes evidence.md and its plots from the results of studies; the project's own into docs/.

    python experiments/evidence.py experiments/results/*.json
    python experiments/evidence.py WORK/results/*.json --docs WORK
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy.stats import wilcoxon

from nnunetv2_hyspark.training.finetuning import FinetuningConfig

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DOCS = Path(__file__).parent.parent / "docs"
HEADER = """# Evidence: does pre-training help?

Tables and plots are written by `python experiments/evidence.py experiments/results/*.json` from the results that
`experiments/study.py` stored; [experiments/README.md](../experiments/README.md) has the command of every study. From
"How to read this" on, people write ([evidence_notes.md](evidence_notes.md)).

Dice in percent, mean over the validation cases and structures, then over seeds (in brackets the standard deviation
over seeds). HD95: 95th percentile of the surface distance, mm, median over cases and seeds; a structure that was
missed altogether counts as farther than any other, and "missed" says how many were. p: two-sided Wilcoxon signed-rank
test over validation cases, each case's Dice averaged over seeds. An arm is compared with `{baseline}`, or with what the
study's file names as its `baselines`, over the seeds that both have; where one has others too, the two means over the
common seeds stand behind p, since the column of Dice is over all. Level: the first step at which the pseudo-Dice on
validation patches, averaged over seeds and over the last {smoothing} epochs, is what the baseline's is at its end;
"itself" is when the baseline gets there, since its last epochs are noisy too. Linear probe: Dice of a linear classifier
on the frozen encoder's features, all scales together, fitted on half of `2 * probe_cases` labelled crops of
`probe_dataset` and tested on the other half, while pre-training goes on; the first one is after one epoch. Minutes:
median over seeds, on machines that did other work beside it; of pre-training one value per pre-training that an arm's
trainings started from.
"""
BASELINE = "scratch"
SMOOTHING = 5
"""Epochs that learning curves are averaged over before they are compared."""


def is_scored(case: dict[str, Any], label: str) -> bool:
    """Whether a case's Dice of a structure counts: not where reference and prediction both lack it (NaN or None).

    A structure that the prediction alone has would count 0 for one arm and not at all for another, so it does not count
    where the number of ``voxels`` is known.
    """
    dice = case["dice"].get(label)
    return dice is not None and bool(np.isfinite(dice)) and case.get("voxels", {}).get(label) != 0


def mean_dice(piece: dict[str, Any]) -> dict[str, float]:
    """Per case, the mean over structures that count, percent; cases without any are left out."""
    means = {}
    for name, case in piece["cases"].items():
        dice = [value for label, value in case["dice"].items() if is_scored(case, label)]
        if dice:
            means[name] = 100 * float(np.mean(dice))
    return means


def labels_of(pieces: list[dict[str, Any]]) -> list[str]:
    """Of the structures, in the order of their numbers."""
    return sorted({label for piece in pieces for case in piece["cases"].values() for label in case["dice"]}, key=int)


def by_structure(pieces: list[dict[str, Any]]) -> str:
    """Mean Dice over cases and seeds, percent; "-" where no case has a structure."""
    shown = []
    for label in labels_of(pieces):
        dice = [
            case["dice"][label] for piece in pieces for case in piece["cases"].values() if is_scored(case, label)
        ]
        shown.append(f"{100 * np.mean(dice):.1f}" if dice else "-")
    return ", ".join(shown)


def distances(pieces: list[dict[str, Any]]) -> str:
    """Median HD95, mm, by structure, and how many structures were missed."""
    shown, missed = [], 0
    for label in labels_of(pieces):
        values = []
        for piece in pieces:
            for case in piece["cases"].values():
                value = case["hd95"].get(label)
                if value is not None:
                    values.append(value)
                elif is_scored(case, label):
                    values.append(math.inf)
        missed += sum(map(math.isinf, values))
        median = float(np.median(values)) if values else math.nan
        shown.append(f"{median:.1f}" if math.isfinite(median) else "-")
    return ", ".join(shown) + (f"; {missed} missed" if missed else "")


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Means of both, percent, over the cases and the seeds that both have, and the p value of their paired
    differences."""
    seeds = {p["seed"] for p in ours} & {p["seed"] for p in theirs}
    sides = [case_means([p for p in pieces if p["seed"] in seeds]) for pieces in (ours, theirs)]
    common = sorted(sides[0].keys() & sides[1].keys())
    first, second = (np.array([side[case] for case in common]) for side in sides)
    p = float(wilcoxon(first - second).pvalue) if np.any(first != second) else 1.0
    return float(first.mean()), float(second.mean()), p


def case_means(pieces: list[dict[str, Any]]) -> dict[str, float]:
    """Per case, the mean over seeds."""
    dice = [mean_dice(piece) for piece in pieces]
    return {case: float(np.mean([d[case] for d in dice if case in d])) for case in {c for d in dice for c in d}}


def comparison(name: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]], steps_per_epoch: int) -> str:
    """Difference to a baseline's pieces in words, empty where there is no common seed."""
    seeds = {piece["seed"] for piece in ours} & {piece["seed"] for piece in theirs}
    if not seeds:
        return ""
    first, second, p = compare(ours, theirs)
    common = [[piece for piece in pieces if piece["seed"] in seeds] for pieces in (ours, theirs)]
    means = f": {first:.1f}, {second:.1f}" if len(seeds) < max(len(ours), len(theirs)) else ""
    ends = smoothed(curve(common[1]))
    above, itself = (np.nonzero(smoothed(curve(pieces)) >= ends[-1])[0] for pieces in common)
    when = f"after {(above[0] + 1) * steps_per_epoch}" if len(above) else "never"
    return (
        f"{name}: {first - second:+.1f} (p {p:.2g}{means}), level {when}, itself after "
        f"{(itself[0] + 1) * steps_per_epoch} of {len(ends) * steps_per_epoch}"
    )


def smoothed(values: np.ndarray) -> np.ndarray:
    """Every value's mean with those before it, over ``SMOOTHING`` epochs, over fewer at the beginning."""
    return np.array([np.nanmean(values[max(0, end - SMOOTHING):end]) for end in range(1, len(values) + 1)])


def curve(pieces: Iterable[dict[str, Any]]) -> np.ndarray:
    """Pseudo-Dice after every epoch, mean over seeds, percent."""
    curves = [piece["curve"] for piece in pieces]
    length = min(map(len, curves))
    return 100 * np.nanmean([c[:length] for c in curves], axis=0)


def steps_per_epoch(study: dict[str, Any]) -> int:
    """Of its fine-tunings."""
    return study["finetuning"].get("iterations_per_epoch", FinetuningConfig().iterations_per_epoch)


def plot_curves(
    study: dict[str, Any], groups: dict[tuple[str, int], list[dict[str, Any]]], folds: dict[int, int], docs: Path
) -> str:
    """Learning curves, smoothed, a panel per fold, which ``folds`` give the number of labelled cases of; returns the
    file's name.

    Arms that are in one panel alone are thin.
    """
    panels = {arm: sum((arm, fold) in groups for fold in folds) for arm in study["arms"]}
    shown = [arm for arm in study["arms"] if panels[arm]]
    most = max(panels.values())
    columns = min(3, len(folds))
    rows, legend_rows = math.ceil(len(folds) / columns), math.ceil(len(shown) / 2)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4 * columns, 3 * rows + 0.2 * legend_rows), squeeze=False, sharex=True, sharey=True,
        layout="constrained",
    )
    colours = plt.get_cmap("tab20" if len(shown) > 10 else "tab10")
    lines = {}
    for axis, (fold, count) in zip(axes.flat, folds.items()):
        for number, arm in enumerate(shown):
            if (arm, fold) in groups:
                values = smoothed(curve(groups[arm, fold]))
                steps = steps_per_epoch(study) * np.arange(1, len(values) + 1)
                width, order = (0.7, 2) if panels[arm] == 1 < most else (1.8, 3)
                (lines[arm],) = axis.plot(steps, values, color=colours(number), linewidth=width, zorder=order)
        axis.set_title(f"{count} labelled cases")
        axis.set_xlabel("steps")
        axis.tick_params(labelbottom=True)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(folds) :]:
        axis.set_axis_off()
    for row in axes:
        row[0].set_ylabel(f"pseudo-Dice, %, {SMOOTHING} epochs")
    figure.legend([lines[arm] for arm in shown], shown, loc="outside lower center", ncols=2, fontsize=8)
    name = f"figures/evidence_{study['name']}.png"
    figure.savefig(docs / name, dpi=110)
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


def with_its_study(results: dict[str, Any], ours: bool) -> dict[str, Any]:
    """Results, if they are ``ours``, with what the study's file says now of the tables: their text, structures, the
    arms' order and baselines. What was trained is told by the copy that was stored with the pieces."""
    file = Path(__file__).parent / "studies" / f"{results.get('study', {}).get('name')}.json"
    if not file.is_file() or not ours:
        return results
    stored, present = results["study"], json.loads(file.read_text(encoding="utf-8"))
    arms = {
        arm: {**stored["arms"].get(arm, options), **{k: v for k, v in options.items() if k == "baselines"}}
        for arm, options in present["arms"].items()
    }
    texts = {key: present[key] for key in ("table", "structures") if key in present}
    return {**results, "study": {**stored, **texts, "arms": arms}}


def extent(study: dict[str, Any], groups: dict[tuple[str, int], list[dict[str, Any]]]) -> list[str]:
    """How many of the trainings that a study's command asks for the tables hold, and what was not run at all."""
    asked = len(study["arms"]) * len(study["folds"]) * len(study["seeds"])
    found = sum(map(len, groups.values()))
    if not asked or found == asked:
        return []
    run = {arm for arm, _ in groups}
    missing = ", ".join(f"`{arm}`" for arm in study["arms"] if arm not in run)
    none = f" None of {missing}." if missing else ""
    return [
        f"{found} of the {asked} trainings that the command asks for were run, chosen with `--arms`, `--folds` and "
        f"`--seeds`.{none}", "",
    ]


def section(results: dict[str, Any], docs: Path) -> list[str]:
    """A study's table, costs and plot."""
    study, machine = results["study"], results["machine"]
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for piece in results["pieces"]:
        if piece["arm"] in study["arms"]:
            groups.setdefault((piece["arm"], piece["fold"]), []).append(piece)
    sizes = {fold: pieces[0]["labelled_cases"] for (_, fold), pieces in groups.items()}
    folds = {fold: sizes[fold] for fold in sorted(sizes, key=lambda fold: (sizes[fold], fold))}
    seconds = sum(p["seconds"] for p in results["pieces"]) + sum(p["seconds"] for p in results["pretraining"].values())
    of_kind = f" ({machine['processor']})" if "processor" in machine else ""
    lines = [
        f"## {study['name']}", "", study["table"], "",
        f"    python experiments/study.py experiments/studies/{study['name']}.json --work WORK", "",
        f"{machine['processors']} processors{of_kind}, {study['device']}; torch {machine['torch']}, nnunetv2 "
        f"{machine['nnunetv2']}, nnunetv2-hyspark {machine['nnunetv2-hyspark']}, Python {machine['python']}; "
        f"{seconds / 3600:.1f} hours in all.", "",
    ]
    lines += extent(study, groups)
    if study.get("structures"):
        lines += [f"Structures, in this order: {', '.join(study['structures'])}.", ""]
    finished = results["pretraining"]
    order = list(study["pretraining"])
    shown_runs = [key for key in finished if finished[key].get("name", key) in order]
    shown_runs.sort(key=lambda key: order.index(finished[key].get("name", key)))
    lines += pretraining_table({key: finished[key] for key in shown_runs})
    lines += losses_of_trainers(study, finished)
    if not study["arms"]:
        return lines
    lines += [
        "| labelled cases | arm | Dice | against | by structure | HD95, mm | seeds | minutes | of pre-training |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for fold, size in folds.items():
        count = f"{size}" if list(folds.values()).count(size) == 1 else f"{size}, fold {fold}"
        for arm, options in study["arms"].items():
            pieces = groups.get((arm, fold))
            if not pieces:
                continue
            dice = [float(np.mean(list(mean_dice(p).values()))) for p in pieces]
            spread = f" ({np.std(dice, ddof=1):.1f})" if len(dice) > 1 else ""
            against = [
                comparison(name, pieces, groups.get((name, fold), []), steps_per_epoch(study))
                for name in options.get("baselines", [BASELINE])
                if name != arm
            ]
            minutes = float(np.median([p["seconds"] for p in pieces])) / 60
            differences = "<br>".join(filter(None, against))
            used = sorted({piece.get("pretraining", options.get("weights")) for piece in pieces} - {None})
            seeds = ", ".join(str(seed) for seed in sorted(p["seed"] for p in pieces))
            pretraining = ", ".join(f"{finished[key]['seconds'] / 60:.0f}" for key in used if key in finished)
            lines.append(
                f"| {count} | {arm} | {np.mean(dice):.1f}{spread} | {differences} | {by_structure(pieces)} | "
                f"{distances(pieces)} | {seeds} | {minutes:.1f} | {pretraining} |"
            )
    settings = ", ".join(f"{key}={value}" for key, value in study["finetuning"].items())
    lines += ["", f"All arms: {settings}. Network: {json.dumps(study['architecture'])}.", "", "Per arm:", ""]
    shown = {arm for arm, _ in groups}
    lines += [f"- `{arm}`: {json.dumps(options)}" for arm, options in study["arms"].items() if arm in shown]
    if groups:
        lines += ["", f"![Learning curves]({plot_curves(study, groups, folds, docs)})", ""]
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


def rounding_section(results: dict[str, Any]) -> list[str]:
    """What `rounding.py` measured: how far the losses of the variants are from blocks of the same precision."""
    by_decoder, settings = results["losses"], results["rounding"]
    count = len(next(iter(next(iter(by_decoder.values())).values())))
    steps = [step for step in (1, 2, 5, 10, 20, 50, 100) if step <= count]
    lines = [
        "## Blocks and dense maps: the same training", "",
        "    python experiments/rounding.py nnUNet_preprocessed/DatasetNNN_NAME/nnUNetHySparKPlans.json --steps "
        f"{count}", "",
        f"Pre-training of the plan's encoder (that of `openkbp_cpu`; {settings['cases']} CTs, "
        f"{settings['batch']} crops of {'x'.join(map(str, settings['patch']))}, three quarters hidden, AdamW 2e-3), "
        "from the same weights on the same crops and masks: a step's loss, relative difference from blocks in the same "
        "precision.", "",
        "| decoder | variant | " + " | ".join(f"step {step}" for step in steps) + " |", "|---" * (2 + len(steps)) + "|",
    ]
    for decoder, losses in by_decoder.items():
        for name, values in losses.items():
            reference = losses[f"{name.split(',')[0]}, blocks"]
            if values is reference:
                continue
            apart = [abs(values[step - 1] / reference[step - 1] - 1) for step in steps]
            lines.append(f"| {decoder} | {name} | " + " | ".join(f"{difference:.0e}" for difference in apart) + " |")
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
        settings = request.get("settings") or {}
        kind = settings.get("decoder", "reconstruction") if request["step"] == "default" else request["step"]
        name = {
            "reconstruction": f"the paper's, {settings.get('decoder_width') or 256} wide",
            "official": "the paper's, 768 wide, as the release's",
            "segmentation": "the segmentation network's",
        }[kind]
        differences = [max(values.values()) for values in benchmark["relative_differences"].values()]
        lines.append(
            f"| {name} | {'x'.join(map(str, request['size']))} | {step['blocks']['median_s']:.2f} | "
            f"{step['dense']['ratio_to_blocks']:.2f} x | {step['official-like']['ratio_to_blocks']:.2f} x | "
            f"{memory['blocks']:.2f} | {memory['dense']:.2f} | {', '.join(f'{d:.0e}' for d in differences)} |"
        )
    return [*lines, ""]


def main() -> None:
    """Reads the files named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files that studies have written")
    parser.add_argument(
        "--docs", type=Path, default=DOCS, help="folder for evidence.md and figures/; default: %(default)s"
    )
    arguments = parser.parse_args()
    docs = arguments.docs
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    lines = [HEADER.format(baseline=BASELINE, smoothing=SMOOTHING)]
    for file in arguments.results:
        ours = file.resolve().parent == Path(__file__).parent / "results"
        results = with_its_study(json.loads(file.read_text(encoding="utf-8")), ours)
        if "study" in results:
            lines += section(results, docs)
        else:
            lines += rounding_section(results) if "rounding" in results else shift_section(results)
    benchmarks = sorted((docs / "figures").glob("benchmark_*.json"))
    lines += cost_section([json.loads(file.read_text(encoding="utf-8")) for file in benchmarks])
    notes = docs / "evidence_notes.md"
    if notes.exists():
        lines += ["", notes.read_text(encoding="utf-8")]
    (docs / "evidence.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
