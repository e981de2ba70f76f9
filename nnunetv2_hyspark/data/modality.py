"""Which modality a pile has, and the channel names that make nnU-Net normalise it accordingly."""

from __future__ import annotations

from collections import Counter
from typing import Any

PER_CASE = "zscore"
UNKNOWN = "unknown"
MIXED = "mixed"
MAX_NAMED = 3


def case_modalities(declared: str, channel_names: tuple[str, ...], hounsfield: list[bool]) -> list[tuple[str, str]]:
    """Name the modality of every channel of one case, with the evidence.

    Args:
        declared: what a DICOM tag or a list says, or an empty string.
        channel_names: what an nnU-Net data set or a list's header says, or nothing.
        hounsfield: per channel, whether the values look like Hounsfield units.

    Returns:
        (modality, evidence) per channel; a source's word counts more than the values.
    """
    result = []
    for channel, is_hounsfield in enumerate(hounsfield):
        if declared:
            result.append((canonical(declared), "stated by its source"))
        elif channel < len(channel_names):
            result.append((canonical(channel_names[channel]), "channel name of its source"))
        elif is_hounsfield:
            result.append(("CT", "range of Hounsfield units"))
        else:
            result.append((UNKNOWN, "not Hounsfield units"))
    return result


def canonical(name: str) -> str:
    """Write the names that matter in one way: CT, MR, PET, mixed; others stay as they are."""
    known = {"ct": "CT", "mr": "MR", "mri": "MR", "pt": "PET", "pet": "PET", "mixed": MIXED, "zscore": PER_CASE}
    return known.get(name.strip().casefold(), name.strip())


def channel_names(stated: str | None, cases: list[dict[str, Any]]) -> tuple[list[str], str]:
    """Choose nnU-Net's channel names for a pile.

    Args:
        stated: the user's word: one modality, or one per channel separated by commas; None to guess.
        cases: records of the taken cases, all with the same number of ``modalities`` ((name, evidence) pairs).

    Returns:
        One channel name per channel ("CT" selects nnU-Net's CT normalisation, unknown and mixed piles get "zscore",
        normalisation per case), and one sentence that says why.

    Raises:
        ValueError: if ``stated`` has a number of names that is neither 1 nor the number of channels.
    """
    count = len(cases[0]["modalities"])
    if stated is not None:
        words = [canonical(word) for word in stated.split(",")]
        if len(words) not in (1, count):
            raise ValueError(
                f"--modality names {len(words)} channels ({stated}) but the cases have {count}; give one name, or "
                f"{count} separated by commas"
            )
        names = [PER_CASE if word == MIXED else word for word in words * (count if len(words) == 1 else 1)]
        sentence = f"Modality: {stated}, as you said. {_normalisation(names)}"
        strangers = _strangers(names, cases)
        if strangers:
            sentence += (
                f" But {len(strangers)} of {len(cases)} cases do not look like Hounsfield units "
                f"({', '.join(strangers[:5])}{', ...' if len(strangers) > 5 else ''}): check them, or say "
                "--modality mixed."
            )
        return names, sentence
    names, parts = [], []
    for channel in range(count):
        found = Counter(record["modalities"][channel][0] for record in cases)
        evidence = Counter(record["modalities"][channel][1] for record in cases).most_common(1)[0][0]
        only = next(iter(found)) if len(found) == 1 else MIXED
        names.append(PER_CASE if only in (MIXED, UNKNOWN) else only)
        where = f"channel {channel}: " if count > 1 else ""
        counts = ", ".join(f"{number} {name}" for name, number in found.most_common(5))
        rare, number = min(found.items(), key=lambda item: item[1])
        if len(found) > 1 and number <= MAX_NAMED:
            odd = [record["id"] for record in cases if record["modalities"][channel][0] == rare]
            counts += f": {', '.join(odd)}"
        parts.append(f"{where}{only} ({evidence})" if len(found) == 1 else f"{where}mixed ({counts})")
    return names, f"Modality, guessed: {'; '.join(parts)}. {_normalisation(names)} --modality overrules the guess."


def _normalisation(names: list[str]) -> str:
    kinds = ["CT normalisation over the whole data set" if name == "CT" else f"'{name}'" for name in names]
    per_case = "" if all(name == "CT" for name in names) else " (z-score per case, unless nnU-Net knows the name)"
    return f"nnU-Net will use {', '.join(kinds)}{per_case}."


def _strangers(names: list[str], cases: list[dict[str, Any]]) -> list[str]:
    return [
        record["id"]
        for record in cases
        if any(name == "CT" and not hounsfield for name, hounsfield in zip(names, record["hounsfield"]))
    ]
