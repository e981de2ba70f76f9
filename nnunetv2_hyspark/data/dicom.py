"""Sorting the DICOM files of one folder into volumes, from their headers alone."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from nnunetv2_hyspark.data.screening import Reason, Rejection

NOT_SCANS = frozenset({"SEG", "RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "SR", "PR", "KO", "REG", "DOC", "FID"})
MODALITY_NAMES = {"PT": "PET", "MR": "MR", "CT": "CT"}
MAX_VOLUMES_PER_SERIES = 8


@dataclass(frozen=True)
class Series:
    """One volume of a DICOM series.

    ``files`` are ordered along the slice normal, ``name`` is short and holds nothing about the patient, ``modality`` is
    the DICOM tag (PT given as PET). ``rejection`` says why it is no volume.
    """

    files: tuple[str, ...]
    name: str
    modality: str
    rejection: Rejection | None = None


@dataclass(frozen=True)
class _Slice:
    file: str
    uid: str
    modality: str
    series_number: str
    instance: int
    size: tuple[int, ...]
    orientation: tuple[float, ...]
    position: tuple[float, ...]


def sort_folder(files: list[str]) -> list[Series]:
    """Group the DICOM files of one folder into volumes.

    Files belong together if they share series, orientation and matrix. A series that holds every position k <= 8 times
    (phases, echoes) becomes k volumes in the order of the instance numbers.

    Args:
        files: paths of DICOM files.

    Returns:
        The volumes, rejected ones included, in the order of series and name.
    """
    found: list[Series] = []
    groups: dict[tuple, list[_Slice]] = defaultdict(list)
    for file in sorted(files):
        try:
            header = _read_header(file)
        except (RuntimeError, ValueError):
            rejection = Rejection(Reason.NOT_A_SCAN, "damaged, or no image at all")
            found.append(Series((file,), os.path.basename(file), "", rejection))
            continue
        frames = header.size[2] if len(header.size) > 2 else 1
        alone = file if frames > 1 else ""
        groups[(header.uid, alone, header.orientation, header.size[:2])].append(header)

    names: dict[str, int] = defaultdict(int)
    for key in sorted(groups):
        for series in _volumes(groups[key], single_file=bool(key[1])):
            names[series.name] += 1
            count = names[series.name]
            name = series.name if count == 1 else f"{series.name}_{count}"
            found.append(Series(series.files, name, series.modality, series.rejection))
    return found


def _read_header(file: str) -> _Slice:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(file)
    reader.ReadImageInformation()

    def tag(key: str) -> str:
        return reader.GetMetaData(key).strip() if reader.HasMetaDataKey(key) else ""

    def numbers(key: str) -> tuple[float, ...]:
        return tuple(round(float(part), 4) for part in tag(key).split("\\") if part.strip())

    instance = tag("0020|0013")
    modality = tag("0008|0060").upper()
    return _Slice(
        file=file,
        uid=tag("0020|000e"),
        modality=MODALITY_NAMES.get(modality, modality),
        series_number=tag("0020|0011"),
        instance=int(instance) if instance.lstrip("+-").isdigit() else 0,
        size=tuple(reader.GetSize()),
        orientation=tuple(round(value, 3) + 0.0 for value in numbers("0020|0037")),
        position=numbers("0020|0032"),
    )


def _volumes(slices: list[_Slice], single_file: bool) -> list[Series]:
    first = slices[0]
    number = first.series_number if first.series_number.isdigit() else ""
    digest = hashlib.blake2b(first.uid.encode(), digest_size=3).hexdigest()
    name = f"s{number}" if number else f"s{digest}"
    files = tuple(item.file for item in slices)
    if first.modality in NOT_SCANS:
        rejection = Rejection(Reason.NOT_A_SCAN, f"DICOM modality {first.modality}")
        return [Series(files, name, first.modality, rejection)]
    if single_file or len(slices) == 1:
        return [Series(files, name, first.modality)]
    if len(first.orientation) != 6 or any(len(item.position) != 3 for item in slices):
        rejection = Rejection(Reason.SLICES_MISSING, f"{len(slices)} slices without position or orientation")
        return [Series(files, name, first.modality, rejection)]

    normal = np.cross(first.orientation[:3], first.orientation[3:])
    stacks: dict[float, list[_Slice]] = defaultdict(list)
    for item in slices:
        stacks[round(float(np.dot(normal, item.position)), 2)].append(item)
    order = sorted(stacks)
    repeats = {len(stack) for stack in stacks.values()}
    problem = _uneven(order)
    if len(repeats) > 1:
        problem = f"some positions {min(repeats)} times, others {max(repeats)} times"
    elif max(repeats) > MAX_VOLUMES_PER_SERIES:
        problem = f"every position {max(repeats)} times, at most {MAX_VOLUMES_PER_SERIES} are taken"
    if problem:
        rejection = Rejection(Reason.SLICES_MISSING, f"{len(slices)} slices, {problem}")
        return [Series(files, name, first.modality, rejection)]
    for stack in stacks.values():
        stack.sort(key=lambda item: (item.instance, item.file))
    return [
        Series(tuple(stacks[position][k].file for position in order), name, first.modality) for k in range(max(repeats))
    ]


def _uneven(positions: list[float]) -> str:
    if len(positions) < 3:
        return ""
    gaps = np.diff(positions)
    usual = float(np.median(gaps))
    tolerance = 0.5 * usual + 0.01
    if gaps.max() > usual + tolerance or gaps.min() < usual - tolerance:
        return f"{gaps.min():g} to {gaps.max():g} mm apart"
    return ""
