"""Writes docs/benchmarks.md from the JSON files of `hyspark benchmark`, and a plot beside each.

    python scripts/benchmark_tables.py docs/figures/benchmark_*.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from nnunetv2_hyspark.benchmark.plot import save_plot

PAGE = Path("docs/benchmarks.md")

HEADER = """# Benchmarks

Every table is written by `python scripts/benchmark_tables.py docs/figures/benchmark_*.json` from what
`hyspark benchmark` measured; the command stands above each.

Three ways to compute the same network with the same weights, run in turn in one process:

- **blocks**: this library. Visible blocks in the encoder, merged up-sampling, sparse projections, channels-last
  memory.
- **dense**: the same code on dense maps multiplied by the mask; everything else, gradients of depthwise convolutions
  too, as good as the block path's. Dense-then-mask as others could write it too, so the stronger reference.
- **official-like**: dense-then-mask in contiguous memory with PyTorch's own norms and separate convolutions, as the
  official release computes; without the projection that it makes and never uses.
- **torch**, **triton**: blocks, with another backend for sparse convolutions than `auto` takes on that device.
- **official release**, in a step: `official-like` with the official release's decoder (width 768, batch norm), the step
  that ours replaces.

A pre-training step reconstructs with the segmentation network's decoder unless a heading says otherwise:
"reconstruction decoder" is the paper's as this library makes it, "step official" the paper's as in the official
release. Commands name the decoder wherever it is not today's default.

`x blocks` is the median over rounds of the variant's time over the block path's in the same round. `GMAC` are
multiply-adds of one forward pass, counted from the shapes that ran. `of peak` is that count, twice, and three times
that with a backward pass, per second, over this machine's measured arithmetic: the faster of a float32 matrix
multiplication and a 3x3x3 convolution of 128 channels. `GB` are the bytes that the operations of all that was timed
read and write, each counting its input and output tensors in full; caches are not modelled, so this is an upper bound
of their traffic to main memory, without the work buffers inside an operation. `of copy` is that count per second over
this machine's measured copy; above 100 % much of it stayed in the caches. `both` is their sum: the share of the time
that arithmetic and copies at full speed would take if they never overlapped. What is missing to 100 % bounds the rest:
operations too small or too irregular for full speed (halo gathers, norms over few voxels, matrices of few rows), and
the interpreter between them. Rounds are what the time allowed; every median is over so many. Where it says that freed
memory was kept, it was so for all variants, as in trainings on CPUs (`heap.py`); otherwise the system clears pages anew
for every large map, which costs dense maps most. Memory is the rise of the resident set (CPU) during one step in a
fresh process, above weights and data.

What was never measured: anything on a GPU. Where there is one, this measures what is missing here:

    hyspark benchmark --device cuda --precision bf16 --batch 8 --json gpu.json --plot gpu.png
"""

STEP_OF_DEFAULT, STEP_OF_PAPER, STEP_OF_OFFICIAL, SEGMENTATION = (
    "benchmark_cpu_default", "benchmark_cpu_reconstruction", "benchmark_cpu_official", "benchmark_cpu_segmentation"
)

AIMS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("encoder, forward and backward: official-like over blocks", "at least 6", STEP_OF_DEFAULT,
     ("encoder_forward_backward", "official-like", "ratio_to_blocks")),
    ("encoder, forward and backward: dense over blocks", "at least 4", STEP_OF_DEFAULT,
     ("encoder_forward_backward", "dense", "ratio_to_blocks")),
    ("the same on the day of the paper's decoder: official-like over blocks", "at least 6", STEP_OF_PAPER,
     ("encoder_forward_backward", "official-like", "ratio_to_blocks")),
    ("the same on the day of the paper's decoder: dense over blocks", "at least 4", STEP_OF_PAPER,
     ("encoder_forward_backward", "dense", "ratio_to_blocks")),
    ("whole step of the default: the official release's over it", "at least 4", STEP_OF_DEFAULT,
     ("step", "official release", "ratio_to_blocks")),
    ("whole step with the paper's decoder: the official release's over it", "at least 4", STEP_OF_PAPER,
     ("step", "official release", "ratio_to_blocks")),
    ("whole step with the official decoder: official-like over blocks", "at least 2, better 2.5", STEP_OF_OFFICIAL,
     ("step", "official-like", "ratio_to_blocks")),
    ("whole step with the official decoder: dense over blocks", "at least 2", STEP_OF_OFFICIAL,
     ("step", "dense", "ratio_to_blocks")),
    ("peak memory of a step of the default, GB", "at most 2.5", STEP_OF_DEFAULT, ("memory_gb", "blocks")),
    ("peak memory of a step with the paper's decoder, GB", "at most 2.5", STEP_OF_PAPER, ("memory_gb", "blocks")),
    ("peak memory of a step with the official decoder, GB", "at most 3.5", STEP_OF_OFFICIAL, ("memory_gb", "blocks")),
    *(
        (f"encoder at mask ratio {ratio} over its time at 0", f"at most {1.08 - float(ratio):.2f}", STEP_OF_DEFAULT,
         ("by_mask_ratio", "blocks", ratio, "ratio_to_0"))
        for ratio in ("0.5", "0.75", "0.9")
    ),
    ("fine-tuning: ResEnc-L over HySparKUNet", "at least 1", SEGMENTATION,
     ("finetuning_step", "ResEnc-L", "ratio_to_HySparKUNet")),
    ("fine-tuning: ResEnc with as many parameters over HySparKUNet", "at least 1, or the reason", SEGMENTATION,
     ("finetuning_step", "ResEnc, narrow", "ratio_to_HySparKUNet")),
    ("prediction: ResEnc-L over HySparKUNet", "at least 1", SEGMENTATION,
     ("prediction", "ResEnc-L", "ratio_to_HySparKUNet")),
    ("prediction: ResEnc with as many parameters over HySparKUNet", "at least 1, or the reason", SEGMENTATION,
     ("prediction", "ResEnc, narrow", "ratio_to_HySparKUNet")),
)
"""What was aimed at on CPUs: in words, the aim, the run that shows it, and where."""

REASONS = """Where an aim is missed, the tables below say why. The encoder was measured on two days, with the same code
and the same kind of processor: its dense maps took as long on both, its blocks 0.68 and 0.77 s, so its
ratios hold for a machine and a day. With the official decoder, dense and blocks share that decoder, which is most of
the step's operations (`GMAC`) and runs close to this machine's arithmetic (`of peak`):
masking has nothing left to save there. HySparKUNet computes several times what a ResEnc of as many parameters does,
because its parameters lie in wide blocks at fine scales, and does it at a higher share of the arithmetic.
"""


def aims(runs: dict[str, dict[str, Any]]) -> list[str]:
    """What was aimed at and what was measured, as far as the runs show it."""
    lines = ["## What was aimed at", "", "| what | aim | measured |", "|---|---|---|"]
    for what, aim, run, keys in AIMS:
        figure: Any = runs.get(run, {})
        for key in keys:
            figure = figure.get(key, {})
        if isinstance(figure, float):
            lines.append(f"| {what} | {aim} | {figure:.2f} |")
    return [*lines, "", *REASONS.splitlines(), ""]


def cell(row: dict[str, Any], key: str, form: str) -> str:
    """A figure, or nothing where an earlier version did not count it."""
    return format(row[key], form) if key in row else ""


def counted(row: dict[str, Any]) -> str:
    """The last cells of a row: counted operations and bytes, their shares of the ceilings and the sum of these."""
    forms = {
        "forward_gmac": ".1f", "share_of_peak": ".0%", "counted_gb": ".2f", "share_of_copy_ceiling": ".0%",
    }
    shares = [row[key] for key in ("share_of_peak", "share_of_copy_ceiling") if key in row]
    both = format(sum(shares), ".0%") if len(shares) == 2 else ""
    return " | ".join([*(cell(row, key, form) for key, form in forms.items()), both])


def rows(title: str, table: dict[str, dict[str, Any]]) -> list[str]:
    """A Markdown table of one measurement."""
    head = "| variant | median s | min | max | rounds | x blocks | GMAC | of peak | GB | of copy | both |"
    lines = [f"**{title}**", "", head, "|" + "---|" * 11]
    for variant, row in table.items():
        lines.append(
            f"| {variant} | {row['median_s']:.2f} | {row['min_s']:.2f} | {row['max_s']:.2f} | {row['repeats']} | "
            f"{row['ratio_to_blocks']:.2f} | {counted(row)} |"
        )
    return [*lines, ""]


def segmentation_rows(title: str, table: dict[str, dict[str, Any]]) -> list[str]:
    """A Markdown table of whole segmentation networks."""
    lines = [
        f"**{title}**", "",
        "| network | million parameters | median s | rounds | x HySparKUNet | million voxels/s | GMAC | of peak | GB | "
        "of copy | both | peak memory, GB |",
        "|" + "---|" * 12,
    ]
    for name, row in table.items():
        lines.append(
            f"| {name} | {row['million_parameters']:.1f} | {row['median_s']:.2f} | {row['repeats']} | "
            f"{row['ratio_to_HySparKUNet']:.2f} | {row['million_voxels_per_second']:.2f} | {counted(row)} | "
            f"{cell(row, 'memory_gb', '.2f')} |"
        )
    return [*lines, ""]


def ratio_rows(figures: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """A Markdown table over mask ratios."""
    lines = [
        "**Mask ratios**: encoder, forward and backward, median s, and over the time with nothing hidden", "",
        "| mask ratio | 1 - ratio | blocks | over 0 | dense | over 0 | rounds |",
        "|---|---|---|---|---|---|---|",
    ]
    for ratio, row in figures["blocks"].items():
        cells = [f"{of['median_s']:.2f} | {of['ratio_to_0']:.3f}" for of in (row, figures["dense"][ratio])]
        lines.append(f"| {ratio} | {1 - float(ratio):.2f} | {' | '.join(cells)} | {row['repeats']} |")
    return [*lines, ""]


def sweep_rows(points: list[dict[str, Any]]) -> list[str]:
    """A Markdown table over crop sizes and batches."""
    lines = [
        "**Crop sizes and batches**: encoder, forward and backward, and whole training step, median s", "",
        "| crop | batch | encoder, blocks | dense | x blocks | step, blocks | dense | x blocks |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for point in points:
        cells = ["out of memory", *[""] * 5]
        if not point["out_of_memory"]:
            timed = [point[key] for key in ("encoder_forward_backward", "step")]
            cells = [
                f"{value:.2f}" for row in timed
                for value in (row["blocks"]["median_s"], row["dense"]["median_s"], row["dense"]["ratio_to_blocks"])
            ]
        lines.append(f"| {'x'.join(map(str, point['size']))} | {point['batch']} | {' | '.join(cells)} |")
    return [*lines, ""]


def convolution_rows(measured: list[dict[str, Any]]) -> list[str]:
    """A Markdown table of single convolutions."""
    lines = [
        "**Single convolutions of the encoder**, on visible blocks and, depthwise ones, on whole images, by every way "
        "that computes them", "",
        "| stage | kind | on | shape | kernel | by | forward, ms | x torch | forward and backward, ms | x torch |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in measured:
        for way, forward in row["forward"].items():
            times = " | ".join(
                f"{1000 * timed['median_s']:.2f} | {timed['ratio_to_torch']:.2f}"
                for timed in (forward, row["forward_backward"][way])
            )
            shape, kernel = ("x".join(map(str, row[key])) for key in ("shape", "kernel"))
            lines.append(f"| {row['stage']} | {row['kind']} | {row['where']} | {shape} | {kernel} | {way} | {times} |")
    return [*lines, ""]


MEASURED = {
    "encoder_forward": "encoder", "step": "step", "memory_gb": "memory", "by_mask_ratio": "mask ratios",
    "sweep": "crop sizes and batches", "convolutions": "single convolutions",
    "finetuning_step": "segmentation networks", "loading": "loading",
}
"""What a run may hold, for its heading."""


def heading(figures: dict[str, Any]) -> str:
    """What was measured, and how the run differs from the others."""
    request, machine = figures["request"], figures["machine"]
    settings = request.get("settings") or {}
    width = settings.get("decoder_width")
    decoder = settings.get("decoder") if request["step"] == "default" else request["step"]
    differences = [
        text for text, is_so in (
            ("step official", decoder == "official"),
            (f"{decoder} decoder{f', {width} wide' if width else ''}",
             decoder == "reconstruction" and {"step", "sweep"} & figures.keys()),
            ("freed memory given back", not machine["gpu"] and not machine.get("freed_memory_is_kept")),
        ) if is_so
    ]
    measured = ", ".join(name for key, name in MEASURED.items() if key in figures).capitalize()
    return f"{measured}: {', '.join(differences)}" if differences else measured


def section(figures: dict[str, Any], plot: str) -> list[str]:
    """Everything one run measured, and its plot, a path from the page."""
    request, machine, top = figures["request"], figures["machine"], figures["ceilings"]
    size = "x".join(map(str, request["size"]))
    planned = request.get("planned")
    kept = ", freed memory kept" if machine.get("freed_memory_is_kept") else ""
    network = f"{planned['configuration']} of {Path(planned['plans']).name}, " if planned else ""
    lines = [
        f"## {heading(figures)}",
        "",
        f"{machine['gpu'] or machine['processor']}: {network}{size}, batch {request['batch']}, "
        f"{request['mask_ratio']:.0%} masked, {request['precision']}, step {request['step']}.",
        "",
        f"    {figures['command']}",
        "",
        f"{machine['threads']} threads{kept}; arithmetic {top['peak_gflops']:.0f} GFLOP/s, copy "
        f"{top['copy_gbs']:.1f} GB/s; torch {figures['versions']['torch']}, Python {figures['versions']['python']}.",
        "",
        f"![What was measured]({plot})",
        "",
    ]
    titles = {
        "encoder_forward": "Encoder, forward",
        "encoder_forward_backward": "Encoder, forward and backward",
        "step": "Whole training step",
    }
    for key, title in titles.items():
        if key in figures:
            lines += rows(title, figures[key])
    if "memory_gb" in figures:
        memory = ", ".join(f"{variant} {gb:.2f}" for variant, gb in figures["memory_gb"].items())
        lines += [f"Peak memory of a step, GB: {memory}.", ""]
    if "by_mask_ratio" in figures:
        lines += ratio_rows(figures["by_mask_ratio"])
    if "sweep" in figures:
        lines += sweep_rows(figures["sweep"])
    if "convolutions" in figures:
        lines += convolution_rows(figures["convolutions"])
    for key, title in (
        ("finetuning_step", "Segmentation networks on dense patches, forward and backward"),
        ("prediction", "Segmentation networks, nnU-Net's sliding-window prediction of one and a half patches"),
    ):
        if key in figures:
            lines += segmentation_rows(title, figures[key])
    if "loading" in figures:
        loading = figures["loading"]
        voxels = "x".join(map(str, loading["case_voxels"]))
        lines += [
            f"**Loading crops** from synthetic cases of {voxels} voxels, compressed as nnU-Net does, on "
            f"{loading['processors']} processors; the share of its time that a training with steps of "
            f"{1000 * loading['step_seconds']:.0f} ms waits", "", "| workers | crops/s | per worker | waiting |",
            "|---|---|---|---|",
        ]
        for workers, row in loading["by_workers"].items():
            rate = row["crops_per_second"]
            lines.append(
                f"| {workers} | {rate:.1f} | {rate / max(int(workers), 1):.1f} | {row['waiting_share']:.0%} |"
            )
        lines.append("")
    return lines


def main() -> None:
    """Reads the files named on the command line."""
    files = [Path(name) for name in sys.argv[1:]]
    if not files:
        raise SystemExit("give the JSON files of hyspark benchmark")
    runs = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    lines = [HEADER, *aims(runs)]
    for file in files:
        figures, plot = runs[file.stem], file.with_suffix(".png")
        save_plot(figures, plot)
        lines += section(figures, Path(os.path.relpath(plot, PAGE.parent)).as_posix())
    PAGE.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
