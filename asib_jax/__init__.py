"""ASIB: multi-teacher knowledge distillation through an adaptive synergy information bottleneck, in JAX."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`asib_jax.distil`, imported when it is asked for: with it come jax and some seconds."""
    if name == "distil":
        from asib_jax.tools.notebook import distil

        return distil
    raise AttributeError(f"module 'asib_jax' has no attribute {name!r}")
