"""SIGTERM and SIGINT: the first asks a run to stop where it can go on later, a second ends the process at once."""

import os
import signal
from types import FrameType

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """The run has stopped as it was asked to; its message says by what, and where its snapshot is."""


class Stop:
    """Listens to both signals within its context, in the main thread. asked: the name of the one that came, or ""."""

    def __init__(self):
        self.asked = ""

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._on) for number in _SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on(self, number: int, frame: FrameType | None) -> None:
        # Straight to the console: what was interrupted may hold the lock of a log.
        if self.asked:
            os.write(2, b"stopped at once\n")
            os._exit(128 + number)
        self.asked = signal.Signals(number).name
        told = f"{self.asked}: stopping at the next training step, with a snapshot; once more to stop at once\n"
        os.write(2, told.encode())
