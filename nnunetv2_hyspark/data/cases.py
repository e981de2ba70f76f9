"""Preprocessed images of nnU-Net, opened without their labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgenerators.utilities.file_and_folder_operations import load_pickle


def find_image(folder: str | os.PathLike[str], identifier: str) -> Path:
    """The file that holds a preprocessed image, in any of nnU-Net's formats (b2nd, npy, npz).

    Raises:
        FileNotFoundError: if there is none.
    """
    for ending in (".b2nd", ".npy", ".npz"):
        path = Path(folder) / f"{identifier}{ending}"
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"case {identifier} has no preprocessed image in {folder}; expected {identifier}.b2nd or .npz, "
        f"so run nnUNetv2_preprocess again for this configuration."
    )


def open_image(path: Path) -> Any:
    """Opens an image ``(C, D, H, W)``.

    b2nd and npy are opened lazily: only what is sliced from them is read, and of b2nd only the touched chunks are
    decompressed. npz cannot do that: the whole case is read and decompressed, for every crop.

    Raises:
        FileNotFoundError: if it is gone.
        ValueError: if the file is damaged; the message names it.
    """
    try:
        if path.suffix == ".b2nd":
            image: Any = blosc2.open(
                urlpath=str(path), mode="r", dparams={"nthreads": 1}, **({} if os.name == "nt" else {"mmap_mode": "r"})
            )
        else:
            image = np.load(path, mmap_mode="r") if path.suffix == ".npy" else np.load(path)["data"]
        # damaged b2nd metadata give an object without a shape
        if len(image.shape) != 4:
            raise ValueError(f"an array of shape {tuple(image.shape)}, expected 4 axes")
        return image
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} is not readable ({type(error).__name__}: {error}); it may be damaged, so delete it and run "
            f"nnUNetv2_preprocess again."
        ) from error


def read_crop(path: Path, corner: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """Reads a box of an image; what lies outside the image is zero, as in nnU-Net.

    Only the box is read from disk, except from npz; see :func:`open_image`.

    Args:
        path: preprocessed image.
        corner: first voxel, may be negative.
        size: voxels per axis.

    Returns:
        float32 ``(C, *size)``.

    Raises:
        FileNotFoundError: if the file is gone.
        ValueError: if the file is damaged or the box holds NaN or infinite voxels; the message names case and file.
    """
    image = open_image(path)
    box = [[start, start + edge] for start, edge in zip(corner, size)]
    try:
        crop = np.ascontiguousarray(crop_and_pad_nd(image, box, 0), dtype=np.float32)
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run nnUNetv2_preprocess again.") from error
    if not np.isfinite(crop).all():
        bad = int((~np.isfinite(crop)).sum())
        raise ValueError(
            f"case {path.stem} holds {bad} NaN or infinite voxels in {path}; expected finite intensities, so repair "
            f"or remove the original image and run nnUNetv2_preprocess again."
        )
    return crop


def image_shape(path: Path) -> tuple[int, int, int]:
    """Voxels per axis of an image."""
    shape = open_image(path).shape
    return int(shape[1]), int(shape[2]), int(shape[3])


def random_corner(shape: Sequence[int], size: Sequence[int], rng: np.random.Generator) -> list[int]:
    """Uniformly random first voxel of a box inside an image; along axes shorter than the box the image lies anywhere
    inside it."""
    corner = []
    for extent, edge in zip(shape, size):
        low, high = min(0, extent - edge), max(0, extent - edge)
        corner.append(int(rng.integers(low, high + 1)))
    return corner


def foreground_voxels(path: Path, at_most: int = 256) -> np.ndarray:
    """Some voxels of the foreground mask that ``hyspark prepare`` made, as nnU-Net's preprocessing has sampled them.

    Args:
        path: preprocessed image; nnU-Net keeps the case's properties beside it.
        at_most: how many are kept, spread evenly over nnU-Net's sample.

    Returns:
        int32 ``(n, 3)``, voxels of the preprocessed image; empty where nothing is known.

    Raises:
        ValueError: if the properties are damaged; the message names their file.
    """
    properties = path.with_suffix(".pkl")
    if not properties.is_file():
        return np.empty((0, 3), np.int32)
    try:
        sampled = np.asarray(load_pickle(str(properties)).get("class_locations", {}).get(1, ()))
        if len(sampled) == 0:
            return np.empty((0, 3), np.int32)
        if sampled.shape[1:] != (4,):
            raise ValueError(f"locations of shape {sampled.shape}, expected (n, 4)")
        return sampled[:: -(-len(sampled) // at_most), 1:].astype(np.int32)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(
            f"{properties} is not readable ({type(error).__name__}: {error}); it may be damaged, so delete it and run "
            f"nnUNetv2_preprocess again."
        ) from error


def corner_around(center: Sequence[int], shape: Sequence[int], size: Sequence[int]) -> list[int]:
    """First voxel of a box around a voxel, moved as little as needed to lie inside the image.

    Along axes longer than the image it is moved as little as needed to hold the image.
    """
    corner = []
    for middle, extent, edge in zip(center, shape, size):
        low, high = min(0, extent - edge), max(0, extent - edge)
        corner.append(min(max(int(middle) - edge // 2, low), high))
    return corner
