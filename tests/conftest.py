"""Four simulated devices for every test; what one test has compiled no other compiles, nor the processes they start."""

import logging
import os
import sys
import tempfile

PROGRAMS = tempfile.TemporaryDirectory()  # before jax, which reads its name
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", PROGRAMS.name)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest

from asib_jax.record import console

jax.config.update("jax_num_cpu_devices", 4)


def pytest_runtest_setup(item):
    """What compares with PyTorch is skipped where that or one of its libraries is not installed."""
    if item.get_closest_marker("pytorch"):
        for module in ("torch", "torchvision_cpu", "timm"):
            pytest.importorskip(module)


@pytest.fixture(scope="session")
def compiled():
    """How many programs have been compiled so far: call it."""
    count = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: count.append(name) if name == "/jax/core/compile/backend_compile_duration" else None
    )
    return lambda: len(count)


@pytest.fixture(scope="module")
def quick_compilation():
    """For tests whose cost is compilation: unoptimised code, in which equal programs still give equal numbers."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def logger_after_use(monkeypatch):
    """The logger of a test that begins logging, as the next test finds it; and stderr."""
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    yield logging.getLogger("asib_jax")
    console.leave()
