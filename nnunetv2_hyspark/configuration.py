"""Hyperparameters from defaults, a plans file and the environment, checked and merged.

A section is a frozen dataclass whose fields carry their limits in ``metadata``: ``range`` (closed, or open with
``open=True``), ``choices``, ``help``. Sources are mappings; a later source wins. Keys are bare (``mask_ratio``), dotted
(``pretraining.mask_ratio``) or nested (``{"pretraining": {"mask_ratio": 0.6}}``). A bare key goes to the active section
if that has it, else to a shared one; a key of another stage's section is not an error, so that one setting serves a
whole pipeline.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, fields, replace
from typing import Any

ENVIRONMENT_VARIABLE = "nnUNet_hyspark"


@dataclass(frozen=True)
class Source:
    """Where settings come from: a name for messages and the settings themselves."""

    name: str
    values: Mapping[str, Any]


def parse_environment(text: str) -> dict[str, Any]:
    """Reads ``nnUNet_hyspark``: a JSON object, or ``key=value,key=value`` whose values are JSON or plain words.

    Raises:
        ValueError: if it is neither.
    """
    text = text.strip()
    if not text:
        return {}
    if text.startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{ENVIRONMENT_VARIABLE} is not valid JSON ({error}); give an object or key=value,key=value."
            ) from None
    values: dict[str, Any] = {}
    for pair in re.split(r",(?=\s*[\w.]+\s*=)", text):
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ValueError(
                f"{ENVIRONMENT_VARIABLE} has {pair!r}; expected key=value pairs separated by commas, or a JSON object."
            )
        try:
            values[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            values[key.strip()] = value.strip()
    return values


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number with more digits than a float can have
        return False


def check_value(field: Field, value: Any, key: str, source: str) -> Any:
    """Returns ``value`` in the field's type, or raises ValueError naming key, value, limits and source."""

    def fail(expected: str) -> None:
        raise ValueError(f"{key} is {value!r} in {source}; expected {expected}.")

    limits = field.metadata
    kind = str(field.type)
    if kind == "bool":
        if not isinstance(value, bool):
            fail("true or false")
        return value
    if kind.startswith("tuple"):
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            fail("a list of whole numbers")
        if any(isinstance(v, bool) or not isinstance(v, int) for v in value):
            fail("a list of whole numbers")
        if "choices" in limits and any(v not in limits["choices"] for v in value):
            fail(f"a list of values out of {list(limits['choices'])}")
        return tuple(value)
    if kind == "str":
        if "choices" in limits and value not in limits["choices"]:
            fail(f"one of {list(limits['choices'])}")
        if not isinstance(value, str):
            fail("a word")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail("a number")
    if not _is_finite(value):
        fail("a finite number")
    if kind == "int":
        if value != int(value):
            fail("a whole number")
        value = int(value)
    else:
        value = float(value)
    if "range" in limits:
        low, high = limits["range"]
        is_open = limits.get("open", False)
        if not (low < value < high if is_open else low <= value <= high):
            fail(f"a value {'strictly ' if is_open else ''}between {low} and {high}")
    return value


def _flatten(values: Mapping[str, Any], sections: Mapping[str, Any], source: str) -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if key in sections:
            if not isinstance(value, Mapping):
                raise ValueError(f"{key} is {value!r} in {source}; expected an object with the keys of that section.")
            flat.update({f"{key}.{inner}": inner_value for inner, inner_value in value.items()})
        else:
            flat[key] = value
    return flat


def resolve(
    defaults: Mapping[str, Any], active: str, shared: Sequence[str], sources: Sequence[Source]
) -> tuple[dict[str, Any], set[str]]:
    """Merges sources into the sections.

    Args:
        defaults: dataclass instance per section name.
        active: section of the stage that runs.
        shared: sections that every stage reads.
        sources: later wins.

    Returns:
        The sections with values set, and the dotted keys that a source set explicitly.

    Raises:
        ValueError: for an unknown key or a value out of range.
    """
    known = {name: {f.name: f for f in fields(section)} for name, section in defaults.items()}
    resolved = dict(defaults)
    explicit: set[str] = set()
    for source in sources:
        for key, value in _flatten(source.values, defaults, source.name).items():
            section, _, name = key.rpartition(".")
            if not section:
                order = [active, *shared, *defaults]
                section = next((s for s in order if name in known[s]), "")
            if section not in known or name not in known[section]:
                names = sorted({n for s in [active, *shared] for n in known[s]})
                close = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(names)}."
                raise ValueError(f"{key!r} in {source.name} is no HySparK setting; {hint}")
            checked = check_value(known[section][name], value, name, source.name)
            resolved[section] = replace(resolved[section], **{name: checked})
            explicit.add(f"{section}.{name}")
    return resolved, explicit
