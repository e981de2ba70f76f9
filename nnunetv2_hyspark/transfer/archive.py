"""Whether a checkpoint file is whole: every byte is checked before anything in it is interpreted."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

_DIRECTORY = 0x10  # torch's reader takes such an entry for a folder and leaves its tensor uninitialised


def check_archive(filename: str | os.PathLike[str]) -> None:
    """Checks the zip archive that ``torch.save`` writes: directory, sizes and the CRC-32 of every entry.

    ``torch.load`` itself compares no checksum: a flipped bit in a weight would go unnoticed. Files whose checksums are
    all zero (``torch.serialization.set_crc32_options(False)``) cannot be compared and pass.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, no such archive, damaged, or would unpack to more than its own size.
    """
    path = Path(filename)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}; give the path of a .pth file.")
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty; the run that wrote it was probably killed, so use another checkpoint.")
    with open(path, "rb") as stream:
        if stream.read(4) != b"PK\x03\x04":
            raise ValueError(
                f"{path} is damaged or not a file of torch.save (since torch 1.6 these are zip archives); pickles and "
                f"older formats are refused, since reading them can execute code: convert such a file where it was "
                f"made, with torch.save({{'network_weights': state_dict}}, file)."
            )
        try:
            with zipfile.ZipFile(stream) as archive:
                _check_entries(archive, size)
        except Exception as error:  # whatever a damaged directory makes zipfile raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{path} is damaged ({printable(reason)}); use another copy of it.") from None


def _check_entries(archive: zipfile.ZipFile, size: int) -> None:
    entries = archive.infolist()
    if not entries:
        raise ValueError("the archive has no entries")
    if len({entry.filename for entry in entries}) != len(entries):
        raise ValueError("the archive has two entries of one name")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("the archive is compressed, which torch.save never does")
    if any(entry.external_attr & _DIRECTORY or entry.is_dir() for entry in entries):
        raise ValueError("the archive has an entry that is a folder")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("the archive claims to hold more than the file's size")
    if all(entry.CRC == 0 for entry in entries):
        return
    damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} is wrong")


def printable(text: str, limit: int = 200) -> str:
    """Text from a file in one line for a terminal: no control characters, at most ``limit`` characters."""
    clean = "".join(c if c.isprintable() else "?" for c in text[: limit + 1])
    return clean if len(clean) <= limit else clean[:limit] + "..."
