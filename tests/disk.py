"""A disk that takes no more, as far as one process can have it."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def longest_file(size: int) -> Iterator[None]:
    """Within it no file of this process grows beyond so many bytes: writing fails with EFBIG."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
