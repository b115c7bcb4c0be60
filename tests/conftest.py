"""Four simulated devices for every test."""
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_default_matmul_precision", "highest")  # as the launch scripts do


@pytest.fixture(scope="module")
def quick_compilation():
    """For tests whose cost is compilation: unoptimised code, in which equal programs still give equal numbers."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
