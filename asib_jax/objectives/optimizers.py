"""Optimizers (SPEC 4 and 5): from gradients to directions. The learning rate is no part of them: it enters each step as
a control, so that its position is never rewound."""

from collections.abc import Mapping
from typing import Any

import jax
import optax


def make_optimizer(
    kind: str,
    *,
    weight_decay: float,
    grad_clip_norm: float,
    momentum: float = 0.9,
    factors: Mapping[str, float] | None = None,
) -> optax.GradientTransformation:
    """Gradients to descent directions, which the step multiplies by minus the learning rate.

    kind: "adamw" (Loshchilov & Hutter 2019) or "sgd" (Nesterov momentum, decay added to the gradient).
    grad_clip_norm: bound of the global gradient norm; 0: none.
    factors: a multiple of the learning rate for each network, by its name; absent: 1.
    """
    clip = optax.clip_by_global_norm(grad_clip_norm) if grad_clip_norm else optax.identity()
    decay = optax.add_decayed_weights(weight_decay, mask=decayed) if weight_decay else optax.identity()
    parts = {"adamw": (clip, optax.scale_by_adam(), decay), "sgd": (clip, decay, optax.trace(momentum, nesterov=True))}
    if factors:
        scale = optax.stateless(
            lambda updates, params: {
                name: jax.tree.map(lambda u: u * factors.get(name, 1.0), branch) for name, branch in updates.items()
            }
        )
        return optax.chain(*parts[kind], scale)
    return optax.chain(*parts[kind])


def decayed(params: Any) -> Any:
    """Mask of the leaves weight decay acts on: kernels, never biases, normalisation parameters or temperatures."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: path[-1].key == "kernel", params)
