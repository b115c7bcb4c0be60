"""ASIB: multi-teacher knowledge distillation through an adaptive synergy information bottleneck, in JAX."""

__version__ = "0.1.0"
