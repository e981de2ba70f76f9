"""Being asked to stop: SIGTERM, SIGINT and SIGUSR1, as schedulers send them before they take a machine away."""

from __future__ import annotations

import os
import signal
import threading
from time import monotonic
from types import FrameType
from typing import Any

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
_PATIENCE_SECONDS = 2.0


class StopSignals:
    """Remembers that a signal came, so that a run can finish its step, save and leave.

    A second Ctrl-C, two seconds or more after the first, interrupts at once. Signals arrive in the main thread only;
    elsewhere this does nothing. Use it as a context: what the signals did before is restored at its end. Processes that
    are forked meanwhile (data workers) end at SIGTERM, and leave the rest to their parent.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._when = 0.0
        self._process = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _remember(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:
            if number == signal.SIGTERM:
                os._exit(128 + number)
        elif self.received is None:
            self.received, self._when = number, monotonic()
        elif number == signal.SIGINT and monotonic() - self._when >= _PATIENCE_SECONDS:
            raise KeyboardInterrupt

    @property
    def name(self) -> str:
        """The signal that came first, or that another process got."""
        return "a signal to another process" if self.received is None else signal.Signals(self.received).name

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as shells report it: SIGINT 130, SIGUSR1 138 on Linux, SIGTERM 143."""
        return 128 + int(signal.SIGTERM if self.received is None else self.received)
