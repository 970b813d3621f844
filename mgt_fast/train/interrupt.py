"""Stopping a run between two steps when the user or the cluster asks for it."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; what clusters send before they kill; what Slurm sends ahead of time (--signal=USR1@300)."""


class RunStoppedError(RuntimeError):
    """A run that stopped on request, with its state saved.

    Attributes:
        signal: what asked for it; None if another rank was asked.
    """

    def __init__(self, message: str, signal_number: int | None):
        super().__init__(message)
        self.signal = signal_number


class StopRequest:
    """Remembers the first of `SIGNALS` inside its block; the second one acts as if there were no block.

    Attributes:
        signal: number of the signal that came; None for none yet.
    """

    def __init__(self):
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # signals reach no other
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
