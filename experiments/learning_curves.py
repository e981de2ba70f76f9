"""Plots of a study's learning curves."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import numpy as np
from comparisons import SMOOTHING, curve, smoothed
from outcomes import Outcome

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def plot_learning_curves(outcome: Outcome, file: Path) -> None:
    """Pseudo-Dice by steps, mean over seeds, smoothed; a panel per subset; arms in one panel alone are thin."""
    arms, labelled = outcome.study["arms"], outcome.labelled
    panels = {arm: sum((arm, fold) in outcome.groups for fold in labelled) for arm in arms}
    shown = [arm for arm in arms if panels[arm]]
    most = max(panels.values())
    columns = min(3, len(labelled))
    rows, legend_rows = math.ceil(len(labelled) / columns), math.ceil(len(shown) / 2)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4 * columns, 3 * rows + 0.2 * legend_rows), squeeze=False, sharex=True, sharey=True,
        layout="constrained",
    )
    colours = plt.get_cmap("tab20" if len(shown) > 10 else "tab10")
    lines = {}
    for axis, (fold, count) in zip(axes.flat, labelled.items()):
        for number, arm in enumerate(shown):
            if pieces := outcome.pieces(arm, fold):
                values = smoothed(curve(pieces))
                steps = outcome.steps_per_epoch * np.arange(1, len(values) + 1)
                width, order = (0.7, 2) if panels[arm] == 1 < most else (1.8, 3)
                (lines[arm],) = axis.plot(steps, values, color=colours(number), linewidth=width, zorder=order)
        axis.set_title(f"{count} labelled cases")
        axis.set_xlabel("steps")
        axis.tick_params(labelbottom=True)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(labelled) :]:
        axis.set_axis_off()
    for row in axes:
        row[0].set_ylabel(f"pseudo-Dice, %, {SMOOTHING} epochs")
    figure.legend([lines[arm] for arm in shown], shown, loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)
