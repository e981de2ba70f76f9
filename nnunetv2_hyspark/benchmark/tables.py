"""Timings as rows of plain values, and rows as lines for the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .timing import Timings


def summary(
    timings: Timings,
    ceilings: Mapping[str, float],
    gmac: Mapping[str, float] | None = None,
    gb: Mapping[str, float] | None = None,
    passes: int = 1,
    reference: str = "blocks",
) -> dict[str, Any]:
    """Medians, spread, ratios to the reference, counted operations and bytes, and their shares of the ceilings.

    Args:
        timings: of every variant.
        ceilings: of :func:`nnunetv2_hyspark.benchmark.timing.ceilings`.
        gmac: giga multiply-adds of one forward pass, per variant.
        gb: gigabytes read and written by all that was timed, per variant.
        passes: forward passes that the timed operations amount to: 3 with a backward pass.
        reference: the variant that ratios refer to.
    """
    rows = {}
    for variant, median in timings.medians().items():
        row = {
            "median_s": median,
            "min_s": min(timings.seconds[variant]),
            "max_s": max(timings.seconds[variant]),
            "repeats": len(timings.seconds[variant]),
            f"ratio_to_{reference}": timings.ratio(variant, reference),
        }
        if gmac is not None:
            row["forward_gmac"] = gmac[variant]
            row["share_of_peak"] = 2 * passes * gmac[variant] / median / ceilings["peak_gflops"]
        if gb is not None:
            row["counted_gb"] = gb[variant]
            row["share_of_copy_ceiling"] = gb[variant] / median / ceilings["copy_gbs"]
        rows[variant] = row
    return rows


def table(title: str, rows: Mapping[str, Any]) -> str:
    """Lines of one measurement."""
    ratio = next(key for key in next(iter(rows.values())) if key.startswith("ratio_to_"))
    with_memory = all("memory_gb" in row for row in rows.values())
    against = f"x {ratio.removeprefix('ratio_to_')}"
    lines = [
        f"{title}:",
        f"  {'variant':<17}{'median s':>10}{'min':>9}{'max':>9}{against:>15}{'GMAC':>9}{'of peak':>9}{'GB':>9}"
        f"{'of copy':>9}" + (f"{'peak GB':>9}" if with_memory else ""),
    ]
    for variant, row in rows.items():
        lines.append(
            f"  {variant:<17}{row['median_s']:>10.3f}{row['min_s']:>9.3f}{row['max_s']:>9.3f}{row[ratio]:>15.2f}"
            f"{row['forward_gmac']:>9.1f}{row['share_of_peak']:>9.0%}{row['counted_gb']:>9.2f}"
            f"{row['share_of_copy_ceiling']:>9.0%}" + (f"{row['memory_gb']:>9.2f}" if with_memory else "")
        )
    return "\n".join(lines)


def ratios_table(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Lines of :func:`nnunetv2_hyspark.benchmark.run.by_ratio`."""
    blocks, dense = rows["blocks"], rows["dense"]
    lines = [
        "encoder forward and backward over mask ratios, and over the time with nothing hidden:",
        f"  {'mask ratio':<12}{'1 - ratio':>10}{'blocks s':>11}{'over 0':>9}{'dense s':>10}{'over 0':>9}",
    ]
    lines += [
        f"  {ratio:<12}{1 - float(ratio):>10.2f}{blocks[ratio]['median_s']:>11.3f}{blocks[ratio]['ratio_to_0']:>9.3f}"
        f"{dense[ratio]['median_s']:>10.3f}{dense[ratio]['ratio_to_0']:>9.3f}"
        for ratio in blocks
    ]
    return "\n".join(lines)


def sweep_table(points: Sequence[Mapping[str, Any]]) -> str:
    """Lines of :func:`nnunetv2_hyspark.benchmark.sweep.sweep`."""
    timed = {"encoder_forward_backward": "encoder", "step": "step"}
    head = "".join(f"{f'{name} s':>11}{'dense s':>10}{'x blocks':>10}" for name in timed.values())
    lines = ["crop sizes and batches, encoder forward and backward, and step:", f"  {'size':<13}{'batch':>5}{head}"]
    for point in points:
        cells = "   out of memory"
        if not point["out_of_memory"]:
            cells = "".join(
                f"{point[key]['blocks']['median_s']:>11.3f}{point[key]['dense']['median_s']:>10.3f}"
                f"{point[key]['dense']['ratio_to_blocks']:>10.2f}"
                for key in timed
            )
        lines.append(f"  {'x'.join(map(str, point['size'])):<13}{point['batch']:>5}{cells}")
    return "\n".join(lines)


def convolutions_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lines of :func:`nnunetv2_hyspark.benchmark.convolutions.measure_convolutions`."""
    lines = [
        "single convolutions of the encoder, forward, and forward and backward:",
        f"  {'stage':<6}{'kind':<10}{'on':<12}{'shape':<22}{'by':<14}{'ms':>9}{'x torch':>9}{'ms':>9}{'x torch':>9}",
    ]
    for row in rows:
        for way, forward in row["forward"].items():
            both = row["forward_backward"][way]
            lines.append(
                f"  {row['stage']:<6}{row['kind']:<10}{row['where']:<12}{'x'.join(map(str, row['shape'])):<22}{way:<14}"
                + "".join(f"{1000 * t['median_s']:>9.2f}{t['ratio_to_torch']:>9.2f}" for t in (forward, both))
            )
    return "\n".join(lines)


def loading_table(figures: Mapping[str, Any]) -> str:
    """Lines of loading."""
    lines = [f"loading, {figures['processors']} processors:", f"  {'workers':<9}{'crops/s':>9}{'waiting':>9}"]
    for workers, row in figures["by_workers"].items():
        lines.append(f"  {workers:<9}{row['crops_per_second']:>9.1f}{row['waiting_share']:>9.1%}")
    return "\n".join(lines)
