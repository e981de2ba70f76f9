"""Pictures of reconstructions: original, masked, reconstruction and error in three planes."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import numpy as np  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402

PLANES = ("axis 0", "axis 1", "axis 2")


def save_reconstruction_picture(
    path: str | os.PathLike[str],
    image: np.ndarray,
    visible: np.ndarray,
    reconstruction: np.ndarray,
    spacing: tuple[float, float, float],
    title: str,
) -> None:
    """Writes a PNG with three rows (middle plane across each axis) and four columns.

    Args:
        path: where to.
        image: one channel ``(D, H, W)``.
        visible: boolean, same shape.
        reconstruction: same shape, in the image's intensities.
        spacing: voxel size in mm, for the aspect ratio.
        title: one line above.
    """
    low, high = np.percentile(image, [0.5, 99.5])
    high = max(high, low + 1e-6)
    error = np.abs(reconstruction - image)
    limit = max(float(np.percentile(error, 99.5)), 1e-6)
    figure, axes = plt.subplots(3, 4, figsize=(11, 8.6), constrained_layout=True)
    for row, axis in enumerate(range(3)):
        middle = image.shape[axis] // 2
        others = [a for a in range(3) if a != axis]
        aspect = spacing[others[0]] / spacing[others[1]]
        cut = [np.take(volume, middle, axis=axis) for volume in (image, visible, reconstruction, error)]
        masked = np.ma.masked_where(~cut[1], cut[0])
        panels = ((cut[0], "original"), (masked, "what the encoder sees"), (cut[2], "reconstruction"), (cut[3], "|error|"))
        for column, (panel, name) in enumerate(panels):
            ax = axes[row, column]
            ax.set_facecolor("#30506e")
            if column == 3:
                ax.imshow(panel, cmap="magma", vmin=0, vmax=limit, aspect=aspect, interpolation="nearest")
            else:
                ax.imshow(panel, cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            if row == 0:
                ax.set_title(name)
        axes[row, 0].set_ylabel(f"middle of {PLANES[axis]}")
    figure.suptitle(title, fontsize=10)
    figure.savefig(Path(path), dpi=90)
    plt.close(figure)
