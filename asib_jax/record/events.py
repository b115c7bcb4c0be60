"""TensorBoard's event files, of which a full disk costs the rest, not the run.

tensorboardX writes in a thread that ends at an error, and then has whoever adds a point wait for ever.
"""

import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger("asib_jax")

_SCHEME = "lasting"  # of paths, by which tensorboardX finds `_Files`


def writer(folder: Path) -> Any:
    """A `tensorboardX.SummaryWriter` in `folder` that never raises for what cannot be written, and warns of it once."""
    import tensorboardX  # imports PyTorch where that is installed, which takes a second
    from tensorboardX import record_writer

    record_writer.register_writer_factory(_SCHEME, _Files())
    return tensorboardX.SummaryWriter(f"{_SCHEME}:{folder}")


class _Files:
    """How tensorboardX makes files and folders of a scheme."""

    def open(self, path: str) -> "_EventFile":
        return _EventFile(path.partition(":")[2])

    def directory_check(self, path: str) -> None:
        os.makedirs(path.partition(":")[2], exist_ok=True)


class _EventFile:
    def __init__(self, path: str):
        self._path, self._file = path, open(path, "wb")  # noqa: SIM115

    def write(self, content: bytes) -> None:
        self._do("write", content)

    def flush(self) -> None:
        self._do("flush")

    def close(self) -> None:
        self._do("close")

    def _do(self, method: str, *content: bytes) -> None:
        try:
            getattr(self._file, method)(*content)
        except OSError as error:
            self._file = open(os.devnull, "wb")  # noqa: SIM115  # as long as the writer lives
            logger.warning("%s lacks the curves from here on: %s", self._path, error)
