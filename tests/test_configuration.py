"""Values of settings are checked where they come from, and a wrong one is named with its key, limits and source."""
from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from nnunetv2_hyspark.configuration import Source, parse_environment, resolve


@dataclass(frozen=True)
class Section:
    """Numbers with and without limits."""

    epochs: int = field(default=10, metadata={"range": (1, 100000)})
    seed: int = 0
    learning_rate: float = field(default=1e-3, metadata={"range": (0.0, 1.0), "open": True})
    margin: float = 0.0


def resolved(text: str) -> Section:
    sections, _ = resolve({"training": Section()}, "training", [], [Source("the variable", parse_environment(text))])
    return sections["training"]


@pytest.mark.parametrize("key", ["epochs", "seed", "learning_rate", "margin"])
@pytest.mark.parametrize(
    ("value", "shown"), [("Infinity", "inf"), ("-Infinity", "-inf"), ("NaN", "nan"), ("1e999", "inf")]
)
def test_numbers_without_end_are_refused(key, value, shown):
    with pytest.raises(ValueError, match=f"^{key} is {shown} in the variable; expected a finite number.$"):
        resolved(f"{key}={value}")


@pytest.mark.parametrize("key", ["epochs", "learning_rate", "margin"])
def test_a_whole_number_too_large_for_a_float_is_refused(key):
    with pytest.raises(ValueError, match=f"^{key} is 10+ in the variable; expected a finite number.$"):
        resolved(f"{key}={10**400}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs=1.5", "epochs is 1.5 in the variable; expected a whole number."),
        ("epochs=0", "epochs is 0 in the variable; expected a value between 1 and 100000."),
        ("learning_rate=1", "learning_rate is 1.0 in the variable; expected a value strictly between 0.0 and 1.0."),
        ("seed=true", "seed is True in the variable; expected a number."),
        ("margin=wide", "margin is 'wide' in the variable; expected a number."),
    ],
)
def test_other_wrong_numbers_are_refused(text, message):
    with pytest.raises(ValueError) as caught:
        resolved(text)
    assert str(caught.value) == message


def test_right_numbers_are_taken():
    assert resolved("epochs=2e1,seed=-3,learning_rate=0.5,margin=-7") == replace(
        Section(), epochs=20, seed=-3, learning_rate=0.5, margin=-7.0
    )
