"""Reading any scan as scalar volumes, and writing volumes so that a file is either whole or absent."""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk

from .writing import no_room

TEMPORARY_PREFIX = ".unfinished-"
# what nibabel raises for damaged headers and pixels; HeaderDataError is neither a ValueError nor an ImageFileError
_NIBABEL_ERRORS = (
    *(OSError, EOFError, ValueError, KeyError, OverflowError, zlib.error),
    *(nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError),
)


@dataclass(frozen=True)
class Volume:
    """One channel: its ``image``, and the ``file`` where nnU-Net can read exactly that, or None if there is none."""

    image: sitk.Image
    file: str | None


def read_channel(files: tuple[str, ...]) -> list[Volume]:
    """Read one channel's file, or the ordered slices of one DICOM series.

    Several components per voxel, or a fourth axis, become several volumes.

    Args:
        files: one image file, or the DICOM files of one series in slice order.

    Returns:
        One volume per channel found (2D images stay 2D).

    Raises:
        ValueError: if the file cannot be read, is cut short or has no pixels.
        MemoryError: if there is not enough memory; ITK may say so by another error, see :func:`is_out_of_memory`.
    """
    if len(files) > 1 or is_dicom(files[0]):
        image = _read_dicom(files)
        in_place = False
    else:
        image, in_place = _read_file(files[0])
    images = _split(image)
    # nnU-Net expands $NAME in the paths of its table
    in_place = in_place and len(images) == 1 and images[0] is image and "$" not in files[0]
    return [Volume(part, files[0] if in_place else None) for part in images]


def is_dicom(file: str | Path) -> bool:
    """Say whether a file carries the DICOM magic, or is named as DICOM files are."""
    try:
        with open(file, "rb") as stream:
            head = stream.read(132)
    except OSError:
        return False
    return head[128:132] == b"DICM" or str(file).lower().endswith((".dcm", ".ima", ".dicom"))


def _read_dicom(files: tuple[str, ...]) -> sitk.Image:
    try:
        if len(files) == 1:
            return sitk.ReadImage(files[0], imageIO="GDCMImageIO")
        reader = sitk.ImageSeriesReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileNames(files)
        return reader.Execute()
    except RuntimeError as error:
        raise ValueError(last_line(error)) from None


def _read_file(file: str) -> tuple[sitk.Image, bool]:
    """Return the image, and whether SimpleITK alone can read it."""
    if not os.path.isfile(file):
        raise ValueError("no such file")
    if os.path.getsize(file) == 0:
        raise ValueError("the file is empty")
    size = check_nifti_is_whole(file, checksum=True) if file.lower().endswith((".nii", ".nii.gz")) else 0
    try:
        return sitk.ReadImage(file), True
    except RuntimeError as error:
        if "orthonormal" in str(error):
            return _read_sheared_nifti(file), False
        # ITK's error for a damaged NIfTI and for want of memory is the same. It holds the voxels as stored and as
        # float32, twice as large for the usual 16 bits; where that cannot be had, this raises MemoryError
        np.empty(min(max(3 * size, 0), 2**62), np.uint8)
        raise ValueError(last_line(error)) from None


def check_nifti_is_whole(file: str | Path, checksum: bool = False) -> int:
    """Raise ValueError if a NIfTI file has fewer bytes than its header promises, or compressed ones are damaged.

    SimpleITK reads such files without a word and leaves the missing voxels undefined.

    Args:
        file: compressed or not.
        checksum: uncompress it all to compare checksums; else a file that ends as it should is taken for whole.

    Returns:
        How many bytes it promises, uncompressed.
    """
    try:
        header: Any = nibabel.load(file).header
        bits = int(header["bitpix"]) * int(np.prod([int(n) for n in header.get_data_shape()], dtype=object))
        expected = int(header["vox_offset"] or 352) + bits // 8
        if not str(file).lower().endswith(".gz"):
            found = os.path.getsize(file)
            complete = found >= expected
        else:
            with open(file, "rb") as stream:
                stream.seek(-4, os.SEEK_END)
                # a gzip file ends with its uncompressed length: free, and wrong only for multi-part files
                found = int.from_bytes(stream.read(4), "little")
            complete = found == expected % 2**32 and not checksum
            if not complete:
                found = _uncompressed_size(file)
                complete = found >= expected
    except _NIBABEL_ERRORS as error:
        raise ValueError(f"not a readable NIfTI file ({last_line(error)})") from None
    if not complete:
        raise ValueError(f"the file is cut short ({found} of {expected} bytes)")
    return expected


def _uncompressed_size(file: str | Path) -> int:
    """Uncompress a file; raise OSError, EOFError or zlib.error if its checksum is wrong or it ends too early."""
    size = 0
    with gzip.open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            size += len(block)
    return size


def _read_sheared_nifti(file: str) -> sitk.Image:
    """Read a NIfTI whose axes are not at right angles, with the closest right-angled directions instead."""
    try:
        source: Any = nibabel.load(file)
        values = np.asanyarray(source.dataobj)
    except _NIBABEL_ERRORS as error:
        raise ValueError(f"not a readable NIfTI file ({last_line(error)})") from None
    if values.ndim != 3:
        raise ValueError(f"axes that are not at right angles and {values.ndim} dimensions, expected 3")
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(source.affine, dtype=np.float64)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise ValueError("the header gives no usable voxel size")
    left, _, right = np.linalg.svd(affine[:3, :3] / spacing)
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.T.astype(values.dtype.newbyteorder("="))))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((left @ right).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    return image


def _split(image: sitk.Image) -> list[sitk.Image]:
    if image.GetDimension() == 4:
        size = list(image.GetSize())
        images = [sitk.Extract(image, size[:3] + [0], [0, 0, 0, t]) for t in range(size[3])]
    elif image.GetDimension() > 4:
        raise ValueError(f"{image.GetDimension()} dimensions, expected 3")
    else:
        images = [image]
    parts = []
    for part in images:
        components = part.GetNumberOfComponentsPerPixel()
        if components == 1 or "complex" in part.GetPixelIDTypeAsString():
            parts.append(part)
        else:
            parts += [sitk.VectorIndexSelectionCast(part, c) for c in range(components)]
    return parts


def write_nifti(image: sitk.Image, target: Path) -> None:
    """Write a compressed NIfTI under a temporary name, check that it is whole, then give it its name.

    Raises:
        OSError: if the disk is full or the folder cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{target.name}")
    try:
        sitk.WriteImage(image, str(temporary), True)
        check_nifti_is_whole(temporary)
        os.replace(temporary, target)
    except (RuntimeError, ValueError) as error:
        free = shutil.disk_usage(target.parent).free
        needed = image.GetNumberOfPixels() * image.GetSizeOfPixelComponent()
        code = errno.ENOSPC if free < needed else errno.EIO
        raise no_room(code, last_line(error), target) from None
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Delete what an interrupted run left under temporary names in ``folder``."""
    for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
        leftover.unlink(missing_ok=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether memory was lacking, which ITK tells by a RuntimeError and mapped files by an OSError."""
    texts = ("Failed to allocate memory", "Cannot allocate memory", "bad_alloc")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


def last_line(error: BaseException) -> str:
    """Return the last line of an error's message, where ITK puts the reason, or its type if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][-200:] if lines else type(error).__name__
