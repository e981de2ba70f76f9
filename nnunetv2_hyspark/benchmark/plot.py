"""One figure of what a benchmark measured."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

TIMED = {
    "encoder_forward": "encoder, forward",
    "encoder_forward_backward": "encoder, forward and backward",
    "step": "whole training step",
    "finetuning_step": "segmentation, forward and backward",
    "prediction": "segmentation, sliding-window prediction",
}
COLOURS = ("#4477aa", "#cc6677", "#999933", "#88ccee", "#aa4499", "#44aa99")


def save_plot(results: Mapping[str, Any], path: Path) -> None:
    """Draws what is in the results, one panel per measurement, into a PNG file.

    Args:
        results: as ``hyspark benchmark`` writes them to JSON.
        path: where to.

    Raises:
        ValueError: if the results hold no measurement.
    """
    panels = _panels(results)
    if not panels:
        raise ValueError("the results hold no measurement to draw; run hyspark benchmark with one of --what.")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(textwrap.fill(_title(results), 55 * columns), fontsize=10)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, draw in zip(grid, panels):
        draw(axes)
        axes.title.set_fontsize(10)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(panels):]:
        axes.set_axis_off()
    figure.savefig(path, dpi=120, format="png")


def _title(results: Mapping[str, Any]) -> str:
    request, machine = results["request"], results["machine"]
    planned = request.get("planned")
    network = (
        f"{Path(planned['plans']).stem} {planned['configuration']}" if planned
        else f"paper's network, base width {request['base_width']}"
    )
    return (
        f"{machine['gpu'] or machine['processor']}: {network}, {_size(request['size'])}, batch {request['batch']}, "
        f"{request['mask_ratio']:.0%} masked, {request['precision']}, step {request['step']}"
    )


def _size(edges: Sequence[int]) -> str:
    return "x".join(map(str, edges))


def _panels(results: Mapping[str, Any]) -> list[Callable[[Axes], None]]:
    drawn: list[Callable[[Axes], None]] = [
        partial(_times, name=name, rows=results[key]) for key, name in TIMED.items() if key in results
    ]
    for key, draw in (
        ("memory_gb", _memory), ("by_mask_ratio", _mask_ratios), ("sweep", _sweep), ("convolutions", _convolutions),
        ("loading", _loading),
    ):
        if key in results:
            drawn.append(partial(draw, figures=results[key]))
    return drawn


def _bars(axes: Axes, names: Sequence[str], heights: Sequence[float], labels: Sequence[str], **options: Any) -> None:
    bars = axes.bar(range(len(names)), heights, color=COLOURS[:len(names)], **options)
    axes.bar_label(bars, labels, fontsize=8, padding=2)
    axes.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
    axes.margins(y=0.15)


def _times(axes: Axes, name: str, rows: Mapping[str, Any]) -> None:
    ratio = next(key for key in next(iter(rows.values())) if key.startswith("ratio_to_"))
    medians = [row["median_s"] for row in rows.values()]
    spread = [
        [row["median_s"] - row["min_s"] for row in rows.values()],
        [row["max_s"] - row["median_s"] for row in rows.values()],
    ]
    labels = [f"{row['median_s']:.3g} s, x{row[ratio]:.2f}" for row in rows.values()]
    _bars(axes, list(rows), medians, labels, yerr=spread, error_kw={"linewidth": 0.8, "capsize": 3})
    axes.set_title(name)
    axes.set_ylabel("s (median; whiskers: min, max)", fontsize=8)


def _memory(axes: Axes, figures: Mapping[str, float]) -> None:
    _bars(axes, list(figures), list(figures.values()), [f"{gb:.2f} GB" for gb in figures.values()])
    axes.set_title("peak memory of a step")
    axes.set_ylabel("GB above weights and data", fontsize=8)


def _mask_ratios(axes: Axes, figures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    for colour, (variant, rows) in zip(COLOURS, figures.items()):
        ratios, shares = zip(*sorted((float(ratio), row["ratio_to_0"]) for ratio, row in rows.items()))
        axes.plot(ratios, shares, "o-", color=colour, label=variant)
    axes.plot((0, 1), (1, 0), "--", color="0.5", label="1 - mask ratio")
    axes.set_title("encoder, forward and backward, over mask ratio")
    axes.set_xlabel("mask ratio", fontsize=8)
    axes.set_ylabel("time / time with nothing hidden", fontsize=8)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)


def _sweep(axes: Axes, figures: Sequence[Mapping[str, Any]]) -> None:
    for number, (key, name) in enumerate((("encoder_forward_backward", "encoder"), ("step", "step"))):
        gains = [0 if point["out_of_memory"] else point[key]["dense"]["ratio_to_blocks"] for point in figures]
        places = [place + 0.4 * number - 0.2 for place in range(len(figures))]
        bars = axes.bar(places, gains, 0.38, color=COLOURS[number], label=name)
        axes.bar_label(bars, [f"{gain:.2f}" if gain else "memory" for gain in gains], fontsize=7, padding=2)
    labels = [f"{_size(point['size'])}\nbatch {point['batch']}" for point in figures]
    axes.set_xticks(range(len(figures)), labels)
    axes.axhline(1, color="0.5", linewidth=0.8)
    axes.margins(y=0.2)
    axes.set_title("dense time over the block path's")
    axes.legend(fontsize=8, frameon=False, ncols=2)


def _convolutions(axes: Axes, figures: Sequence[Mapping[str, Any]]) -> None:
    """Time of every other way over the reference's; a bar to the left of 1 is faster."""
    others = [
        (f"{row['kind']}, {row['where']} {_size(row['shape'])}: {way}", timed["ratio_to_torch"])
        for row in figures for way, timed in row["forward_backward"].items() if way != "torch"
    ]
    names, ratios = zip(*others) if others else ((), ())
    bars = axes.barh(range(len(names)), ratios, color=COLOURS[0])
    axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], fontsize=7, padding=2)
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.invert_yaxis()
    axes.axvline(1, color="0.5", linewidth=0.8)
    axes.margins(x=0.15)
    axes.set_title("single convolutions, forward and backward")
    axes.set_xlabel("time / PyTorch's", fontsize=8)


def _loading(axes: Axes, figures: Mapping[str, Any]) -> None:
    rows = figures["by_workers"]
    axes.plot(list(rows), [row["crops_per_second"] for row in rows.values()], "o-", color=COLOURS[0])
    axes.set_ylim(bottom=0)
    axes.set_title(f"loading crops, {figures['processors']} processors")
    axes.set_xlabel("workers", fontsize=8)
    axes.set_ylabel("crops / s", fontsize=8)
