"""Warm-up and cosine, per group."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_hyspark.training.schedule import WarmupCosineSchedule, warmup_cosine


def optimizer(*groups: dict) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(1))], **group} for group in groups or ({},)])


@given(st.floats(0, 1), st.floats(0, 0.99))
def test_factor_is_a_fraction(progress, warmup):
    assert 0 <= warmup_cosine(progress, warmup) <= 1


@pytest.mark.parametrize(
    ("progress", "warmup", "factor"),
    [(0, 0.1, 0), (0.05, 0.1, 0.5), (0.1, 0.1, 1), (0.55, 0.1, 0.5), (1, 0.1, 0), (0, 0, 1), (0.5, 0, 0.5)],
)
def test_factor(progress, warmup, factor):
    assert warmup_cosine(progress, warmup) == pytest.approx(factor, abs=1e-12)


def rates(schedule, steps) -> list[float]:
    found = []
    for step in range(steps):
        schedule.set_step(step)
        found.append(schedule.optimizer.param_groups[0]["lr"])
    return found


def test_whole_run():
    """Never zero, one peak at the end of the warm-up, which is a tenth of the run at most; then down."""
    found = rates(WarmupCosineSchedule(optimizer(), 1e-3, 20, 10, 5), 100)
    assert min(found) > 0 and max(found) == pytest.approx(1e-3, rel=0.02)
    peak = found.index(max(found))
    assert 8 <= peak <= 10
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)
    assert found[-1] < 1e-5


def test_no_warmup():
    found = rates(WarmupCosineSchedule(optimizer(), 1e-3, 5, 0, 2), 10)
    assert found[0] == pytest.approx(1e-3) and found == sorted(found, reverse=True)


def test_groups():
    """Each by its own scale; only encoder groups are frozen, for exactly so many epochs."""
    made = optimizer({"name": "encoder-3", "lr_scale": 0.1}, {"name": "decoder", "lr_scale": 1.0}, {})
    schedule = WarmupCosineSchedule(made, 1e-3, 4, 0, 3, frozen_epochs=2)
    for step in range(12):
        schedule.set_step(step)
        encoder, decoder, other = (group["lr"] for group in made.param_groups)
        assert decoder == other > 0
        assert encoder == (0 if step < 6 else pytest.approx(0.1 * decoder))


def test_a_frozen_encoder_warms_up_when_it_is_let_go():
    """As long as the run itself did, here 10 steps; the decoder goes on as ever."""
    made = optimizer({"name": "encoder-3", "lr_scale": 0.5}, {"name": "decoder", "lr_scale": 1.0})
    schedule = WarmupCosineSchedule(made, 1e-3, 10, 1, 10, frozen_epochs=3)
    shares = []
    for step in range(100):
        schedule.set_step(step)
        encoder, decoder = (group["lr"] for group in made.param_groups)
        shares.append(encoder / decoder)
    assert shares[:30] == [0.0] * 30
    assert shares[30:40] == pytest.approx([0.5 * n / 10 for n in range(1, 11)])
    assert shares[40:] == pytest.approx([0.5] * 60)


def test_epoch_is_its_first_step_and_needs_no_state():
    schedule = WarmupCosineSchedule(optimizer(), 1e-3, 10, 1, 7)
    expected = rates(schedule, 70)
    resumed = WarmupCosineSchedule(optimizer(), 1e-3, 10, 1, 7)
    resumed.step(6)
    assert resumed.optimizer.param_groups[0]["lr"] == expected[42]
