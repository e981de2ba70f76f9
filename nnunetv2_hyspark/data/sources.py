"""Finding scans: in folders, single files, lists and nnU-Net data sets."""

from __future__ import annotations

import csv
import fnmatch
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from nnunetv2_hyspark.data.dicom import Series, sort_folder
from nnunetv2_hyspark.data.screening import Reason, Rejection
from nnunetv2_hyspark.data.volumes import is_dicom

IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl", ".gipl.gz", ".hdr")
LIST_ENDINGS = (".csv", ".tsv", ".txt", ".json")
# never opened to look for DICOM: .img, .raw and .zraw are the pixels of a header beside them
NO_SCAN_ENDINGS = frozenset(
    (
        *(".img", ".raw", ".zraw", ".gz", ".bz2", ".xz", ".zip", ".tar", ".tgz", ".7z"),
        *(".txt", ".csv", ".tsv", ".json", ".xml", ".yaml", ".yml", ".log", ".md", ".html", ".pdf", ".xlsx", ".docx"),
        *(".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".mp4", ".stl", ".obj", ".vtk", ".bval", ".bvec"),
        *(".py", ".m", ".sh", ".npy", ".npz", ".pkl", ".pt", ".pth", ".h5", ".hdf5", ".mat", ".b2nd"),
    )
)
LABEL_FOLDERS = re.compile(
    r"^(labels?(tr|ts)?|segmentations?|segs?|masks?|gt_segmentations|foreground_masks|annotations?)$", re.IGNORECASE
)
LABEL_NAMES = re.compile(
    r"((^|[_\-. ])d?(seg|segmentation|segmentations|label|labels|labelmap|mask|gt|annotation|roi)$)"
    r"|(^(segmentation|label|labels|mask)[_\-. ]?\d*$)",
    re.IGNORECASE,
)
CHANNEL_SUFFIX = re.compile(r"^(.+)_(\d{4})$")
MAX_CHANNELS_BY_NAME = 8
ID_COLUMNS = frozenset({"id", "case", "case_id", "identifier", "name"})
MODALITY_COLUMNS = frozenset({"modality"})


@dataclass(frozen=True)
class Case:
    """One scan to look at.

    ``channels`` holds one tuple of files per channel: a single image file, or a DICOM series in slice order.
    ``names`` are candidates for the identifier, shortest first; the last is unique within its source.
    ``channel_names`` and ``modality`` are what the source says about them, if it does.
    """

    source: str
    channels: tuple[tuple[str, ...], ...]
    names: tuple[str, ...]
    modality: str = ""
    channel_names: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """What identifies the case between runs: the first file of every channel."""
        return "|".join(files[0] for files in self.channels)


@dataclass
class Pile:
    """Everything found: ``cases`` to look at, ``refused`` files with the reason, ``ignored`` file endings counted."""

    cases: list[Case] = field(default_factory=list)
    refused: list[tuple[Case, Rejection]] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


FolderSorter = Callable[[list[list[str]]], Iterable[list[Series]]]


def _sort_here(folders: list[list[str]]) -> Iterable[list[Series]]:
    return map(sort_folder, folders)


def find_cases(
    sources: list[str],
    raw_folder: Path,
    test_images: bool = True,
    split_channels: bool = False,
    exclude: tuple[str, ...] = (),
    sort_folders: FolderSorter = _sort_here,
) -> Pile:
    """List the scans of all sources, without reading pixels.

    Args:
        sources: folders, image files, CSV / TSV / TXT / JSON lists, or nnU-Net data sets (number or DatasetNNN_Name).
        raw_folder: nnU-Net's folder of raw data sets.
        test_images: whether the imagesTs of nnU-Net data sets are taken too.
        split_channels: whether every channel of a case becomes a case of its own.
        exclude: shell patterns; a scan whose path or shortest name matches one is left out.
        sort_folders: turns the DICOM files of each folder into volumes; replace it to work in parallel.

    Returns:
        Cases in a fixed order.

    Raises:
        FileNotFoundError: if a source does not exist.
        ValueError: if a source holds no scan at all, or a list cannot be understood.
    """
    pile = Pile()
    for source in dict.fromkeys(sources):
        found = _find_in_source(source, raw_folder, test_images, sort_folders)
        if not found.cases and not found.refused:
            seen = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in found.ignored.most_common(5))
            raise ValueError(
                f"no scan found in {source} ({f'only other files: {seen}' if seen else 'it is empty'}); expected "
                "NIfTI, NRRD, MHA or DICOM files, so point --from at the folder that holds them"
            )
        pile.cases += found.cases
        pile.refused += found.refused
        pile.ignored += found.ignored
    if split_channels:
        pile.cases = [part for case in pile.cases for part in _split_channels(case)]
    _drop_repeats(pile)
    _drop_excluded(pile, exclude)
    return pile


def _drop_repeats(pile: Pile) -> None:
    """The same files through two sources (a folder and a folder inside it) are one case."""
    first: dict[str, Case] = {}
    for case in pile.cases:
        first.setdefault(case.place, case)
    pile.cases = list(first.values())


def _drop_excluded(pile: Pile, patterns: tuple[str, ...]) -> None:
    if not patterns:
        return
    kept = []
    for case in pile.cases:
        names = [case.names[0]] + [files[0] for files in case.channels]
        hits = [p for p in patterns if any(fnmatch.fnmatch(name, p) for name in names)]
        if hits:
            pile.refused.append((case, Rejection(Reason.EXCLUDED, f"matches --exclude {hits[0]}")))
        else:
            kept.append(case)
    pile.cases = kept


def _split_channels(case: Case) -> list[Case]:
    if len(case.channels) == 1:
        return [case]
    return [
        replace(
            case,
            channels=(files,),
            names=tuple(f"{name}_c{number}" for name in case.names),
            channel_names=case.channel_names[number : number + 1],
        )
        for number, files in enumerate(case.channels)
    ]


def _find_in_source(source: str, raw_folder: Path, test_images: bool, sort_folders: FolderSorter) -> Pile:
    if re.fullmatch(r"\d{1,3}|Dataset\d{3}_[^/\\]+", source) and not (source[0] == "D" and os.path.exists(source)):
        return _from_nnunet(_nnunet_folder(source, raw_folder), source, test_images)
    path = Path(source).expanduser().absolute()
    if path.is_dir():
        if _is_nnunet(path):
            return _from_nnunet(path, source, test_images)
        return _from_folder(path, source, sort_folders)
    if not path.exists():
        raise FileNotFoundError(
            f"{source} does not exist; --from takes a folder, an image, a CSV or JSON list, or the number of an "
            "nnU-Net data set"
        )
    if path.name.lower().endswith(LIST_ENDINGS):
        return _from_list(path, source, sort_folders)
    return _from_file(path, source, sort_folders)


# --- nnU-Net data sets


def _nnunet_folder(source: str, raw_folder: Path) -> Path:
    prefix = f"Dataset{int(source):03d}_" if source.isdigit() else source
    found = sorted(p for p in raw_folder.glob(f"{prefix}*") if p.is_dir() and (source.isdigit() or p.name == source))
    if len(found) == 1:
        return found[0]
    if not found:
        raise FileNotFoundError(
            f"there is no nnU-Net data set {source} in {raw_folder}; check the number, or write ./{source} if you mean "
            "a folder or file"
        )
    raise ValueError(
        f"data set {source} is ambiguous in {raw_folder} ({', '.join(p.name for p in found)}); give the full name"
    )


def _is_nnunet(folder: Path) -> bool:
    if not (folder / "dataset.json").is_file():
        return False
    content = _load_json(folder / "dataset.json")
    return isinstance(content, dict) and "file_ending" in content and "channel_names" in content


def _from_nnunet(folder: Path, source: str, test_images: bool) -> Pile:
    if not (folder / "dataset.json").is_file():
        raise ValueError(
            f"{folder} has no dataset.json; give its images as a folder instead (--from {folder / 'imagesTr'})"
        )
    content = _dataset_json(folder / "dataset.json")
    named = content.get("channel_names", content.get("modality", {}))
    channel_names = tuple(str(named[key]) for key in sorted(named, key=int))
    ending = content["file_ending"]
    pile = Pile()

    def add(name: str, files: list[str], part: str) -> None:
        pile.cases.append(
            Case(
                source=source,
                channels=tuple((file,) for file in files),
                names=(name, f"{folder.name[:10]}_{name}", f"{folder.name}_{part}_{name}"),
                channel_names=channel_names if len(channel_names) == len(files) else (),
            )
        )

    if "dataset" in content:
        for name, entry in content["dataset"].items():
            add(name, [os.path.abspath(folder / os.path.expandvars(file)) for file in entry["images"]], "imagesTr")
    for part in ("imagesTr", "imagesTs"):
        if (part == "imagesTr" and "dataset" in content) or (part == "imagesTs" and not test_images):
            continue
        if (folder / part).is_dir():
            grouped: dict[str, list[str]] = defaultdict(list)
            for file in sorted(os.listdir(folder / part)):
                match = CHANNEL_SUFFIX.match(file[: -len(ending)]) if file.endswith(ending) else None
                if match and not file.startswith("."):
                    grouped[match[1]].append(str(folder / part / file))
            for name, files in grouped.items():
                add(name, files, part)
    return pile


def _dataset_json(path: Path) -> dict[str, Any]:
    """Load a data set's dataset.json, and check the parts that are used here."""
    content = _load_json(path)
    folder = "or give its images as a folder instead"
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object; repair it, {folder}")
    ending = content.get("file_ending")
    if not isinstance(ending, str) or not ending:
        raise ValueError(
            f"{path} names no file_ending, as data sets of nnU-Net v1 do not; convert it with "
            f"nnUNetv2_convert_old_nnUNet_dataset, {folder}"
        )
    for key in ("channel_names", "modality"):
        named = content.get(key, {})
        if not isinstance(named, dict) or not all(number.isdecimal() for number in named):
            raise ValueError(
                f'{path} gives {json.dumps(named)[:80]} as {key}, expected an object like {{"0": "CT"}}; repair it, '
                f"{folder}"
            )
    table = content.get("dataset", {})
    if not isinstance(table, dict):
        raise ValueError(
            f"the dataset in {path} is a {type(table).__name__}, expected an object of cases; repair it, {folder}"
        )
    for name, entry in table.items():
        images = entry.get("images") if isinstance(entry, dict) else None
        if not _is_list_of_paths(images):
            raise ValueError(
                f'the case {name} in {path} is {json.dumps(entry)[:80]}, expected an object with a list "images"; '
                f"repair it, {folder}"
            )
    return content


# --- folders and files


def _from_folder(folder: Path, source: str, sort_folders: FolderSorter) -> Pile:
    pile = Pile()
    dicom: dict[str, list[str]] = {}
    visited: set[str] = set()
    for where, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(where, folder)
        is_label_folder = any(LABEL_FOLDERS.match(part) for part in Path(inside).parts if part != ".")
        images: list[str] = []
        for name in sorted(files):
            # ._name are macOS's resource forks, named like images
            if name.startswith(".") or name.upper() == "DICOMDIR":
                continue
            path = os.path.join(where, name)
            ending = image_ending(name)
            if ending and (is_label_folder or LABEL_NAMES.search(name[: -len(ending)])):
                case = Case(source, ((path,),), (name[: -len(ending)],))
                pile.refused.append((case, Rejection(Reason.LABEL, "the name says label; list it to take it anyway")))
            elif ending:
                images.append(path)
            elif _ending(name) not in NO_SCAN_ENDINGS and is_dicom(path):
                dicom.setdefault(where, []).append(path)
            else:
                pile.ignored[_ending(name)] += 1
        pile.cases += [
            Case(source, channels, _names(folder, where, name)) for name, channels in _group_channels(images)
        ]
    _add_series(pile, source, folder, dicom, sort_folders)
    return pile


def _from_file(path: Path, source: str, sort_folders: FolderSorter) -> Pile:
    pile = Pile()
    ending = image_ending(path.name)
    if ending:
        pile.cases.append(
            Case(source, ((str(path),),), _names(path.parent, str(path.parent), path.name[: -len(ending)]))
        )
    elif is_dicom(path):
        _add_series(pile, source, path.parent, {str(path.parent): [str(path)]}, sort_folders)
    else:
        raise ValueError(
            f"{source} is not a scan or list; expected {', '.join(IMAGE_ENDINGS[:6])}, DICOM, or a list "
            f"({', '.join(LIST_ENDINGS)})"
        )
    return pile


def _add_series(pile: Pile, source: str, root: Path, dicom: dict[str, list[str]], sort_folders: FolderSorter) -> None:
    for where, volumes in zip(dicom, sort_folders(list(dicom.values()))):
        for series in volumes:
            names = _names(root, where, f"{os.path.basename(where)}_{series.name}")
            case = Case(source, (series.files,), names, series.modality)
            if series.rejection is None:
                pile.cases.append(case)
            else:
                pile.refused.append((case, series.rejection))


def _group_channels(images: list[str]) -> list[tuple[str, tuple[tuple[str, ...], ...]]]:
    """Join NAME_0000, NAME_0001, ... of one folder to one case; complete runs of at most 8 count as channels."""
    groups: dict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)
    result: list[tuple[str, tuple[tuple[str, ...], ...]]] = []
    for path in images:
        name = os.path.basename(path)
        ending = image_ending(name)
        match = CHANNEL_SUFFIX.match(name[: -len(ending)])
        if match:
            groups[(match[1], ending)].append((int(match[2]), path))
        else:
            result.append((name[: -len(ending)], ((path,),)))
    for (base, ending), members in groups.items():
        numbers = [number for number, _ in members]
        if numbers == list(range(len(members))) and len(members) <= MAX_CHANNELS_BY_NAME:
            result.append((base, tuple((path,) for _, path in members)))
        else:
            result += [(os.path.basename(path)[: -len(ending)], ((path,),)) for _, path in members]
    return sorted(result)


def _names(root: Path, where: str, name: str) -> tuple[str, ...]:
    """Candidates for an identifier: the name, with the root's name, with the path below the root."""
    inside = os.path.relpath(where, root)
    below = "_".join(part for part in Path(inside).parts if part not in (".", ".."))
    return (name, f"{root.name}_{name}", "_".join(part for part in (root.name, below, name) if part))


def image_ending(name: str) -> str:
    """Return the ending of an image file's name as it is written there, or an empty string for other files."""
    lower = name.lower()
    for ending in sorted(IMAGE_ENDINGS, key=len, reverse=True):
        if lower.endswith(ending) and len(name) > len(ending):
            return name[-len(ending) :]
    return ""


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


# --- lists


@dataclass(frozen=True)
class _Entry:
    paths: list[str]
    name: str = ""
    modality: str = ""
    channel_names: tuple[str, ...] = ()


def _from_list(path: Path, source: str, sort_folders: FolderSorter) -> Pile:
    entries = _json_entries(path) if path.suffix.lower() == ".json" else _table_entries(path)
    pile = Pile()
    for entry in entries:
        files = [_resolve(written, path.parent) for written in entry.paths]
        if len(files) == 1 and os.path.isdir(files[0]):
            inner = _from_folder(Path(files[0]), source, sort_folders)
            many = len(inner.cases) > 1
            pile.cases += [
                replace(
                    case,
                    modality=entry.modality or case.modality,
                    names=((f"{entry.name}_{number}" if many else entry.name), *case.names)
                    if entry.name
                    else case.names,
                )
                for number, case in enumerate(inner.cases)
            ]
            pile.refused += inner.refused
            continue
        channels: list[tuple[str, ...]] = []
        rejection = None
        modality = entry.modality
        for file in files:
            if os.path.isdir(file):
                inner = _from_folder(Path(file), source, sort_folders)
                if len(inner.cases) != 1:
                    detail = f"{len(inner.cases)} scans in {file}, expected one for a channel"
                    rejection = Rejection(Reason.CHANNELS, detail)
                    break
                channels += inner.cases[0].channels
            elif not os.path.isfile(file):
                rejection = Rejection(Reason.UNREADABLE, f"no such file: {file}")
                break
            else:
                channels.append((file,))
        stem = os.path.basename(files[0])
        stem = stem[: len(stem) - len(image_ending(stem))]
        names = _names(Path(files[0]).parent, os.path.dirname(files[0]), stem)
        case = Case(
            source=source,
            channels=tuple(channels) or tuple((file,) for file in files),
            names=(entry.name, *names) if entry.name else names,
            modality=modality,
            channel_names=entry.channel_names,
        )
        if rejection is None:
            pile.cases.append(case)
        else:
            pile.refused.append((case, rejection))
    return pile


def _resolve(written: str, folder: Path) -> str:
    return os.path.abspath(folder / os.path.expandvars(os.path.expanduser(written)))


def _table_entries(path: Path) -> list[_Entry]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the list {path} is not a text file ({error}); save it as UTF-8 CSV") from None
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not lines:
        raise ValueError(f"the list {path} is empty; write one scan per line")
    if path.suffix.lower() == ".txt":
        return [_Entry([line.strip()]) for line in lines]
    delimiter = max(",;\t", key=lines[0].count)
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter)]
    if not _is_header(rows) and any(_is_path(cell, path.parent) for cell in rows[0]):
        return [_Entry([cell for cell in row if cell]) for row in rows]
    header = [name.lower() for name in rows[0]]
    example = next((row for row in rows[1:] if any(row)), [])
    columns = [
        number
        for number, name in enumerate(header)
        if name not in ID_COLUMNS | MODALITY_COLUMNS
        and not LABEL_NAMES.search(name)
        and number < len(example)
        and _is_path(example[number], path.parent)
    ]
    if not columns:
        raise ValueError(
            f"the list {path} has no column of image paths (found {', '.join(rows[0])}); write one column per channel "
            "with the paths, and if you like the columns 'id' and 'modality'"
        )
    id_column = next((number for number, name in enumerate(header) if name in ID_COLUMNS), None)
    modality_column = next((number for number, name in enumerate(header) if name in MODALITY_COLUMNS), None)
    entries = []
    for row in rows[1:]:
        row = row + [""] * (len(header) - len(row))
        paths = [row[number] for number in columns if row[number]]
        if paths:
            entries.append(
                _Entry(
                    paths,
                    row[id_column] if id_column is not None else "",
                    row[modality_column] if modality_column is not None else "",
                    tuple(rows[0][number] for number in columns) if len(paths) == len(columns) > 1 else (),
                )
            )
    return entries


def _is_header(rows: list[list[str]]) -> bool:
    """Say whether the first row is surely titles, even if folders of these names lie beside the list."""
    if any(image_ending(cell) or "/" in cell or "\\" in cell for cell in rows[0]):
        return False
    known = any(cell.lower() in ID_COLUMNS | MODALITY_COLUMNS or LABEL_NAMES.search(cell) for cell in rows[0])
    return known or (len(rows) > 1 and all(any(image_ending(cell) for cell in row) for row in rows[1:]))


def _is_path(cell: str, folder: Path) -> bool:
    return bool(cell) and (bool(image_ending(cell)) or os.path.exists(_resolve(cell, folder)))


def _json_entries(path: Path) -> list[_Entry]:
    content = _load_json(path)
    if isinstance(content, dict) and isinstance(content.get("training"), list):
        content = content["training"]
    if not isinstance(content, (dict, list)):
        raise ValueError(f"the list {path} holds only {json.dumps(content)[:80]}; write a JSON list of image paths")
    entries = []
    for name, item in content.items() if isinstance(content, dict) else (("", item) for item in content):
        entry = _json_entry(str(name), item)
        if entry is None:
            raise ValueError(
                f"the list {path} holds {json.dumps(item)[:80]}; expected a path, a list of paths (one per channel), "
                'or an object with "image" or "images" and, if you like, "id" and "modality"'
            )
        entries.append(entry)
    if not entries:
        raise ValueError(f"the list {path} is empty; write a JSON list of image paths")
    return entries


def _json_entry(name: str, item: object) -> _Entry | None:
    if isinstance(item, dict):
        paths = item.get("images", item.get("image"))
        inner = _json_entry(str(item.get("id", name)), paths)
        if inner is None or isinstance(paths, dict):
            return None
        return replace(inner, modality=str(item.get("modality", "")))
    if isinstance(item, str) and item:
        return _Entry([item], name)
    if _is_list_of_paths(item):
        return _Entry(item, name)
    return None


def _is_list_of_paths(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(part, str) and part for part in value)


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}); repair it, or give a folder instead") from None
