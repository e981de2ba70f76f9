"""Pictures of reconstructions: original, masked, reconstruction and error in three planes."""

from __future__ import annotations

import os
from collections.abc import Sequence
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
    figure, axes = plt.subplots(3, 4, figsize=(11, 8.6))
    figure.subplots_adjust(0.03, 0.01, 0.99, 0.93, 0.03, 0.03)  # a layout that is worked out takes most of the time
    for row, axis in enumerate(range(3)):
        middle = image.shape[axis] // 2
        others = [a for a in range(3) if a != axis]
        aspect = spacing[others[0]] / spacing[others[1]]
        cut = [np.take(volume, middle, axis=axis) for volume in (image, visible, reconstruction, error)]
        masked = np.ma.masked_where(~cut[1], cut[0])
        names = ("original", "what the encoder sees", "reconstruction", "|error|")
        panels = tuple(zip((cut[0], masked, cut[2], cut[3]), names))
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


def three_planes(volume: np.ndarray, low: float, high: float) -> np.ndarray:
    """The middle planes across the three axes side by side, as 8-bit gray.

    Args:
        volume: ``(D, H, W)``.
        low, high: intensities that become black and white.
    """
    planes = [np.take(volume, volume.shape[axis] // 2, axis=axis) for axis in range(3)]
    height = max(plane.shape[0] for plane in planes)
    padded = [np.pad(p, ((0, height - p.shape[0]), (0, 2)), constant_values=low) for p in planes]
    scaled = (np.hstack(padded) - low) / max(high - low, 1e-6)
    return (np.nan_to_num(scaled).clip(0, 1) * 255).round().astype(np.uint8)


def save_gray(path: str | os.PathLike[str], pixels: np.ndarray) -> None:
    """Writes 8-bit gray ``(H, W)`` as PNG."""
    plt.imsave(Path(path), np.repeat(pixels[..., None], 3, axis=2), format="png")


def read_gray(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads what :func:`save_gray` wrote."""
    try:
        return (plt.imread(Path(path))[..., 0] * 255).round().astype(np.uint8)
    except (SyntaxError, IndexError) as error:  # what Pillow raises for half a PNG
        raise ValueError(f"{path} is no picture of ours ({error}); delete it.") from error


def save_contact_sheet(
    path: str | os.PathLike[str], rows: Sequence[tuple[str, np.ndarray]], title: str
) -> None:
    """Writes a PNG of labelled rows.

    Args:
        path: where to.
        rows: label and 8-bit gray ``(H, W)``, all of one shape.
        title: one line above.
    """
    height, width = rows[0][1].shape
    figure, axes = plt.subplots(
        len(rows), 1, figsize=(7, 0.6 + 6 * len(rows) * height / width), constrained_layout=True, squeeze=False
    )
    for axis, (label, pixels) in zip(axes[:, 0], rows):
        axis.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(Path(path), dpi=90)
    plt.close(figure)
