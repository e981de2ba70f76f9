"""Writes docs/benchmarks.md from the JSON files of `hyspark benchmark`.

    python scripts/benchmark_tables.py docs/figures/benchmark_*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HEADER = """# Benchmarks

Every table is written by `python scripts/benchmark_tables.py docs/figures/benchmark_*.json` from what
`hyspark benchmark` measured; the command stands above each.

Three ways to compute the same network with the same weights, run in turn in one process:

- **blocks**: this library. Visible blocks in the encoder, merged up-sampling, sparse projections, channels-last
  memory.
- **dense**: the same code on dense maps multiplied by the mask; everything else as good as the block path's.
- **official-like**: dense-then-mask in contiguous memory with PyTorch's own norms and separate convolutions, as the
  official release computes; without the projection that it makes and never uses.

`x blocks` is the median over rounds of the variant's time over the block path's in the same round. `GMAC` are
multiply-adds of one forward pass, counted from the shapes that ran. `of peak` is that count, twice, and three times
for a whole step, per second, over this machine's measured float32 matrix multiplication. Memory is the rise of the
resident set (CPU) during one step in a fresh process, above weights and data. A share above 100 % says that the
measured matrix multiplication was no ceiling for the convolutions (the two were not equally undisturbed).

What was never measured: anything on a GPU.
"""


def rows(title: str, table: dict[str, dict[str, Any]]) -> list[str]:
    """A Markdown table of one measurement."""
    head = "| variant | median s | min | max | x blocks | GMAC | of peak |"
    lines = [f"**{title}**", "", head, "|---|---|---|---|---|---|---|"]
    for variant, row in table.items():
        gmac = f"{row['forward_gmac']:.0f}" if "forward_gmac" in row else ""
        share = f"{row['share_of_matmul_ceiling']:.0%}" if "share_of_matmul_ceiling" in row else ""
        lines.append(
            f"| {variant} | {row['median_s']:.2f} | {row['min_s']:.2f} | {row['max_s']:.2f} | "
            f"{row['ratio_to_blocks']:.2f} | {gmac} | {share} |"
        )
    return [*lines, ""]


def segmentation_rows(title: str, table: dict[str, dict[str, Any]]) -> list[str]:
    """A Markdown table of whole segmentation networks."""
    lines = [
        f"**{title}**", "",
        "| network | million parameters | median s | x HySparKUNet | million voxels/s | GMAC | of peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in table.items():
        lines.append(
            f"| {name} | {row['million_parameters']:.1f} | {row['median_s']:.2f} | "
            f"{row['ratio_to_HySparKUNet']:.2f} | {row['million_voxels_per_second']:.2f} | {row['forward_gmac']:.0f} | "
            f"{row['share_of_matmul_ceiling']:.0%} |"
        )
    return [*lines, ""]


def section(figures: dict[str, Any]) -> list[str]:
    """Everything one run measured."""
    request, machine, top = figures["request"], figures["machine"], figures["ceilings"]
    size = "x".join(map(str, request["size"]))
    lines = [
        f"## {machine['gpu'] or machine['processor']}: {size}, batch {request['batch']}, "
        f"{request['mask_ratio']:.0%} masked, {request['precision']}, step {request['step']}",
        "",
        f"    {figures['command']}",
        "",
        f"{machine['threads']} threads; matrix multiplication {top['matmul_gflops']:.0f} GFLOP/s, copy "
        f"{top['copy_gbs']:.1f} GB/s; torch {figures['versions']['torch']}, Python {figures['versions']['python']}.",
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
        lines += section(json.loads(file.read_text(encoding="utf-8")))
    Path("docs/benchmarks.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
