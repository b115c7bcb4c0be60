"""ASIB: multi-teacher knowledge distillation through an adaptive synergy information bottleneck, in JAX."""
