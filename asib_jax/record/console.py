"""The console, which may be closed, full or gone without ending a run, and the log of a run's folder."""

import contextlib
import logging
import logging.handlers
import os
import sys
from pathlib import Path
from typing import Any, TextIO, cast

import jax
from tqdm import tqdm

from asib_jax.engine import hosts

logger = logging.getLogger("asib_jax")

_COLOURS = {"warning": 33, "error": 31}  # yellow and red, of ECMA-48
_BEFORE_A_FOLDER = 10_000  # records that are kept for the log.txt of the run's folder


class Lasting:
    """A stream that never raises: once it has failed, `failed` says how, and it is silent.

    Neither a reader that has gone (`2>&1 | head`), a closed terminal nor a full disk may cost what is computed. stream:
    None where it was closed before Python began.
    """

    def __init__(self, stream: TextIO | None):
        self.failed: Exception | None = None
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115  # as long as the process lives
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for the locale may lack a character of some name

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self._fail(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._stream, self.failed = open(os.devnull, "w"), error  # noqa: SIM115
        # For log.txt alone: another thread may hold the console's lock, and wait for the one that is held here.
        logger.debug("the console takes no more (%s); this log goes on", error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def lasting(stream: TextIO | None) -> TextIO:
    """The stream as a `Lasting` one, if it is not one yet."""
    return cast(TextIO, stream if isinstance(stream, Lasting) else Lasting(stream))


def marked(kind: str, text: str) -> str:
    """`text` after "warning: " or "error: ", which has a colour where stderr is a terminal that shows some.

    `NO_COLOR` (https://no-color.org) and TERM=dumb forbid it.
    """
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stderr.isatty()
    return f"{kind}: {text}" if plain else f"\033[{_COLOURS[kind]}m{kind}:\033[0m {text}"


class _Console(logging.Handler):
    """Messages alone, on stderr, above a progress bar instead of through it; of hosts after the first the warnings
    alone, after the host's number."""

    def emit(self, record: logging.LogRecord) -> None:
        text, warns = self.format(record), record.levelno >= logging.WARNING
        if warns:
            text = marked("error" if record.levelno >= logging.ERROR else "warning", text)
        if hosts.is_first():
            tqdm.write(text, file=sys.stderr)
        elif warns:
            tqdm.write(f"host {jax.process_index()}: {text}", file=sys.stderr)


class _LogFile(logging.FileHandler):
    """log.txt, with time and level. While it cannot be written a run goes on; the console says so, once."""

    def __init__(self, path: Path):
        super().__init__(path, encoding="utf-8", errors="backslashreplace")  # for files whose names are no text
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S"))
        self._failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._failed:
            self._failed = True
            logger.warning("%s lacks what follows: %s", self.baseFilename, sys.exc_info()[1])

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def listen(level: int) -> None:
    """Show what the logger `asib_jax` is told from `level` on, and keep it for the log.txt of a run to come."""
    _begin(level, logging.handlers.MemoryHandler(_BEFORE_A_FOLDER, flushLevel=logging.CRITICAL + 1))


def setup_logging(folder: str | os.PathLike) -> logging.Logger:
    """The logger `asib_jax`, writing to the console and, with time, level and debugging messages, to `folder/log.txt`,
    which has what was told since `listen`, too.

    A second call moves it to another folder. Of several hosts the first alone writes the file.
    """
    file = _LogFile(Path(folder) / "log.txt") if hosts.is_first() else logging.NullHandler()
    for handler in logger.handlers:
        if isinstance(handler, logging.handlers.MemoryHandler):
            handler.setTarget(file)
            handler.flush()
    _begin(logging.DEBUG, file)
    return logger


def leave() -> None:
    """Close what was opened: the logger is as it was before."""
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


def _begin(level: int, second: logging.Handler) -> None:
    sys.stderr = lasting(sys.stderr)
    leave()
    logger.addHandler(_Console(logging.INFO))
    logger.addHandler(second)
    logger.setLevel(level)
    logger.propagate = False  # absl installs a root handler that would print everything twice
