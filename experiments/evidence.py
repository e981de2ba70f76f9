"""Writes evidence.md and its plots from the results of studies; the project's own into docs/.

    python experiments/evidence.py experiments/results/*.json
    python experiments/evidence.py WORK/results/*.json --docs WORK
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from comparisons import SMOOTHING
from learning_curves import plot_learning_curves
from outcomes import BASELINE, Outcome, read_results
from study_tables import SIGNIFICANT, at_a_glance, in_full

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
HEADER = """# Evidence: does pre-training help?

Tables and plots are written by `python experiments/evidence.py experiments/results/*.json` from the results that
`experiments/study.py` stored; [experiments/README.md](../experiments/README.md) has the command of every study. What
stands between "At a glance" and "All results" people wrote ([evidence_notes.md](evidence_notes.md)).
"""
AT_A_GLANCE = f"""## At a glance

Mean Dice in percent over validation cases, structures and seeds. In brackets the difference to the same network from
scratch, of other networks from scratch to the first one, over the seeds that both have, bold where p < {SIGNIFICANT};
and the number of seeds where not all were run. Every row is trained alike but for what it says.
"""
ALL_RESULTS = f"""## All results

Dice in percent, mean over the validation cases and structures, then over seeds (in brackets the standard deviation
over seeds). HD95: 95th percentile of the surface distance, mm, median over cases and seeds; a structure that was
missed altogether counts as farther than any other, and "missed" says how many were. p: two-sided Wilcoxon signed-rank
test over validation cases, each case's Dice averaged over seeds. An arm is compared with `{BASELINE}`, or with what the
study's file names as its `baselines`, over the seeds that both have; where one has others too, the two means over the
common seeds stand behind p, since the column of Dice is over all. Level: the first step at which the pseudo-Dice on
validation patches, averaged over seeds and over the last {SMOOTHING} epochs, is what the baseline's is at its end;
"itself" is when the baseline gets there, since its last epochs are noisy too. Linear probe: Dice of a linear classifier
on the frozen encoder's features, all scales together, fitted on half of `2 * probe_cases` labelled crops of
`probe_dataset` and tested on the other half, while pre-training goes on; the first one is after one epoch. Minutes:
median over seeds, on machines that did other work beside it; of pre-training one value per pre-training that an arm's
trainings started from.
"""


def shift_section(results: dict[str, Any]) -> list[str]:
    """What `feature_shift.py` measured."""
    scales = len(results["rows"][0]["shares"])
    lines = [
        "### How far features move when the rest of the image is hidden", "",
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
        "### Blocks and dense maps: the same training", "",
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
        "### What a step costs", "",
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
    glances, sections = [], []
    for file in arguments.results:
        ours = file.resolve().parent == HERE / "results"
        results = read_results(file, HERE / "studies" if ours else None)
        if "study" in results:
            outcome = Outcome.of(results)
            glances += at_a_glance(outcome)
            sections += in_full(outcome)
            if outcome.groups:
                name = f"figures/evidence_{outcome.study['name']}.png"
                plot_learning_curves(outcome, docs / name)
                sections += [f"![Learning curves]({name})", ""]
        else:
            sections += rounding_section(results) if "rounding" in results else shift_section(results)
    benchmarks = sorted((docs / "figures").glob("benchmark_*.json"))
    sections += cost_section([json.loads(file.read_text(encoding="utf-8")) for file in benchmarks])
    lines = [HEADER]
    if glances:
        lines += [AT_A_GLANCE, *glances]
    notes = docs / "evidence_notes.md"
    if notes.exists():
        lines.append(notes.read_text(encoding="utf-8"))
    lines += [ALL_RESULTS, *sections]
    (docs / "evidence.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
