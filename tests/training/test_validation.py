"""Which cases are reconstructed at the end of pre-training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_hyspark.pretext.hyspark import TARGETS
from nnunetv2_hyspark.training.validation import UNITS, evenly_spread


@given(st.integers(0, 300), st.integers(0, 300))
def test_cases_are_spread_evenly(count: int, limit: int) -> None:
    names = [f"case_{number}" for number in range(count)]
    chosen = evenly_spread(names, limit)
    assert len(chosen) == len(set(chosen)) == (min(count, limit) if limit else count)
    numbers = [names.index(name) for name in chosen]
    assert numbers == sorted(numbers)
    if count > 1 < len(chosen):
        assert numbers[0] == 0 and numbers[-1] == count - 1
        distances = {b - a for a, b in zip(numbers, numbers[1:])}
        assert max(distances) - min(distances) <= 1


def test_every_target_has_its_units() -> None:
    assert set(UNITS) == set(TARGETS)


@pytest.mark.parametrize("limit", [0, 1])
def test_at_most_so_many_cases_are_reconstructed(make_trainer, limit: int) -> None:
    trainer = make_trainer(f"validation_cases={limit}")
    trainer.initialize()
    trainer.perform_actual_validation()
    _, held_out = trainer.do_split()
    assert len(held_out) == 2
    summary = json.loads((trainer.folder / "validation" / "summary.json").read_text())
    cases = [entry["case"] for entry in summary["metric_per_case"]]
    assert cases == sorted(held_out[:limit] or held_out)
    assert all((trainer.folder / "validation" / f"{case}.png").is_file() for case in cases)
    assert ("Reconstructing 1 of 2 cases" in Path(trainer.log_file).read_text()) == bool(limit)


@pytest.mark.parametrize("broken", [1, 2])
def test_held_out_cases_that_cannot_be_read_are_left_out_where_asked(make_trainer, broken: int) -> None:
    trainer = make_trainer("on_broken_case=skip")
    trainer.initialize()
    _, held_out = trainer.do_split()
    for name in held_out[:broken]:
        file = Path(trainer.preprocessed_dataset_folder) / f"{name}.b2nd"
        file.write_bytes(file.read_bytes()[:300])
    trainer.perform_actual_validation()
    summary = json.loads((trainer.folder / "validation" / "summary.json").read_text())
    assert [entry["case"] for entry in summary["metric_per_case"]] == held_out[broken:]
    assert bool(summary["mean"]) == (broken == 1)
    log = Path(trainer.log_file).read_text()
    assert f"WARNING: {held_out[0]} is left out: " in log
    assert ("no held-out case could be read" in log) == (broken == 2)
    with pytest.raises((OSError, ValueError)):
        strict = make_trainer("on_broken_case=stop")
        strict.initialize()
        strict.perform_actual_validation()
