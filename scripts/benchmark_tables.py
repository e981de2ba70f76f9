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

`x blocks` is the median over rounds of the variant's time over the block path's in the same round. `GMAC` are
multiply-adds of one forward pass, counted from the shapes that ran. `of peak` is that count, twice, and three times
that with a backward pass, per second, over this machine's measured arithmetic: the faster of a float32 matrix
multiplication and a 3x3x3 convolution of 128 channels. `GB` are the bytes that the operations of all that was timed
read and write, each counting its input and output tensors in full; caches are not modelled, so this is an upper bound
of their traffic to main memory, without the work buffers inside an operation. `of copy` is that count per second over
this machine's measured copy; above 100 % much of it stayed in the caches. Where it says that freed memory was kept, it
was so for all variants, as in trainings on CPUs (`heap.py`); otherwise the system clears pages anew for every large
map, which costs dense maps most. Memory is the rise of the resident set (CPU) during one step in a fresh process, above
weights and data.

What was never measured: anything on a GPU.
"""


def cell(row: dict[str, Any], key: str, form: str) -> str:
    """A figure, or nothing where an earlier version did not count it."""
    return format(row[key], form) if key in row else ""


def counted(row: dict[str, Any]) -> str:
    """The last cells of a row: counted operations and bytes, and their shares of the ceilings."""
    forms = {
        "forward_gmac": ".1f", "share_of_peak": ".0%", "counted_gb": ".2f", "share_of_copy_ceiling": ".0%",
    }
    return " | ".join(cell(row, key, form) for key, form in forms.items())


def rows(title: str, table: dict[str, dict[str, Any]]) -> list[str]:
    """A Markdown table of one measurement."""
    head = "| variant | median s | min | max | x blocks | GMAC | of peak | GB | of copy |"
    lines = [f"**{title}**", "", head, "|---|---|---|---|---|---|---|---|---|"]
    for variant, row in table.items():
        lines.append(
            f"| {variant} | {row['median_s']:.2f} | {row['min_s']:.2f} | {row['max_s']:.2f} | "
            f"{row['ratio_to_blocks']:.2f} | {counted(row)} |"
        )
    return [*lines, ""]


def segmentation_rows(title: str, table: dict[str, dict[str, Any]]) -> list[str]:
    """A Markdown table of whole segmentation networks."""
    lines = [
        f"**{title}**", "",
        "| network | million parameters | median s | x HySparKUNet | million voxels/s | GMAC | of peak | GB | "
        "of copy | peak memory, GB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in table.items():
        lines.append(
            f"| {name} | {row['million_parameters']:.1f} | {row['median_s']:.2f} | "
            f"{row['ratio_to_HySparKUNet']:.2f} | {row['million_voxels_per_second']:.2f} | {counted(row)} | "
            f"{cell(row, 'memory_gb', '.2f')} |"
        )
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


def section(figures: dict[str, Any], plot: str) -> list[str]:
    """Everything one run measured, and its plot, a path from the page."""
    request, machine, top = figures["request"], figures["machine"], figures["ceilings"]
    size = "x".join(map(str, request["size"]))
    planned = request.get("planned")
    kept = ", freed memory kept" if machine.get("freed_memory_is_kept") else ""
    network = f"{planned['configuration']} of {Path(planned['plans']).name}, " if planned else ""
    lines = [
        f"## {machine['gpu'] or machine['processor']}: {network}{size}, batch {request['batch']}, "
        f"{request['mask_ratio']:.0%} masked, {request['precision']}, step {request['step']}",
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
        lines += ["**Encoder, forward and backward, over its time with nothing hidden**", ""]
        lines += ["| mask ratio | time | 1 - ratio |", "|---|---|---|"]
        lines += [f"| {r} | {t:.3f} | {1 - float(r):.2f} |" for r, t in figures["by_mask_ratio"].items()]
        lines.append("")
    if "sweep" in figures:
        lines += sweep_rows(figures["sweep"])
    if "convolutions" in figures:
        lines += convolution_rows(figures["convolutions"])
    for key, title in (("finetuning_step", "forward and backward"), ("prediction", "forward")):
        if key in figures:
            lines += segmentation_rows(f"Segmentation networks on dense patches, {title}", figures[key])
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
    lines = [HEADER]
    for file in files:
        figures, plot = json.loads(file.read_text(encoding="utf-8")), file.with_suffix(".png")
        save_plot(figures, plot)
        lines += section(figures, Path(os.path.relpath(plot, PAGE.parent)).as_posix())
    PAGE.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
