"""Signals that ask a run to stop where it can go on later; one that insists, coming again, ends the process at once."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again
_INSIST = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
_ASK = (signal.SIGHUP, signal.SIGUSR1)  # a terminal that closes sends the one twice, SLURM the other before SIGTERM


class Interrupted(Exception):
    """The run has stopped as it was asked to; its message says by what, and where its snapshot is."""


class Stop:
    """Listens to these signals within its context. asked: the name of the first that came, or "".

    Where SIGHUP is ignored, as under nohup, it stays so. Beside the main thread no signal can be heard, and none is
    changed.
    """

    def __init__(self):
        self.asked = ""
        self._insisted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is not threading.main_thread():
            return self
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
        self._before = {number: signal.signal(number, self._on) for number in {*_INSIST, *_ASK} - ignored}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on(self, number: int, frame: FrameType | None) -> None:
        insists = number in _INSIST
        if insists and self._insisted:
            _tell("stopped at once\n")
            os._exit(128 + number)
        self._insisted |= insists
        name = signal.Signals(number).name
        self.asked = self.asked or name
        more = "; once more to stop at once" if insists else ""
        _tell(f"{name}: stopping at the next training step, with a snapshot{more}\n")


def _tell(text: str) -> None:
    """Straight to the console, which may be gone: what was interrupted may hold the lock of a log."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
