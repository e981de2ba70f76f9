"""Signals are remembered, and what they did before comes back."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_processes_end_at_sigterm_and_ignore_the_rest() -> None:
    context = multiprocessing.get_context("fork")
    with StopSignals() as stop:
        worker = context.Process(target=time.sleep, args=(60,), daemon=True)
        worker.start()
        assert worker.pid is not None
        time.sleep(0.2)
        for number in (signal.SIGINT, signal.SIGUSR1):
            os.kill(worker.pid, number)
        time.sleep(0.2)
        assert worker.is_alive()
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 143 and stop.received is None


def test_other_threads_are_left_alone() -> None:
    def use() -> None:
        with StopSignals() as stop:
            seen.append(stop.received)

    seen: list[int | None] = []
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [None]
