"""Stopping a run between two steps when the user or the cluster asks for it."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; what clusters send before they kill; what Slurm sends ahead of time (--signal=USR1@300)."""

LIMIT = 20.0
"""Seconds that one of many ranks goes on after SIGTERM; torchrun sends SIGKILL after 30."""


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

    With a limit the process exits that long after SIGTERM, wherever it is then. torchrun sends SIGTERM to the
    ranks that are left when one is lost, and a step that waits for the lost one may never end.

    Args:
        limit: seconds from SIGTERM to the end of the block; None waits for ever.
        name: of this process, for the message when the limit is reached.

    Attributes:
        signal: number of the signal that came; None for none yet.
    """

    def __init__(self, limit: float | None = None, name: str = "this process"):
        self.signal: int | None = None
        self.limit, self.name = limit, name
        self._before: dict[int, object] = {}
        self._watch: _Watch | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # signals reach no other
            if self.limit is not None:
                self._watch = _Watch(self.limit, self.name)
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        self._restore()
        if self._watch is not None:
            self._watch.end()
            self._watch = None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class _Watch:
    """A thread that ends the process some time after SIGTERM.

    Python runs handlers between two instructions of the main thread, which has none while it waits in a
    collective. The number of a signal, however, is written to the wakeup file at once.
    """

    def __init__(self, limit: float, name: str):
        self._limit, self._name = limit, name
        self._over = threading.Event()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="stop limit", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """End the watch, and with it the limit."""
        self._over.set()
        signal.set_wakeup_fd(self._before)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def _run(self) -> None:
        while number := os.read(self._read, 1):
            if number[0] == signal.SIGTERM and not self._over.wait(self._limit):
                message = (
                    f"{self._name} was asked to stop (SIGTERM), but {self._limit:g} s later its step has "
                    "not ended: it may wait for a rank that is gone. Exiting; continue with --resume\n"
                )
                os.write(2, message.encode())  # sys.stderr may be locked by the main thread
                os._exit(128 + signal.SIGTERM)
