"""Signals are remembered, and what they did before comes back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from nnunetv2_hyspark.training import signals
from nnunetv2_hyspark.training.signals import STOP_SIGNALS, StopSignals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_decides(number: int) -> None:
    before = {n: signal.getsignal(n) for n in STOP_SIGNALS}
    with StopSignals() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == number and stop.exit_status == 128 + number and stop.name == signal.Signals(number).name
    assert {n: signal.getsignal(n) for n in STOP_SIGNALS} == before


def test_a_second_interrupt_after_a_while_is_obeyed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        later = signals.monotonic() + 3
        monkeypatch.setattr(signals, "monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.received == signal.SIGINT


def test_other_threads_are_left_alone() -> None:
    def use() -> None:
        with StopSignals() as stop:
            seen.append(stop.received)

    seen: list[int | None] = []
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [None]
