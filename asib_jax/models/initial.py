"""Variables drawn at random: each network's depend on the seed, its name and its own form alone."""
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from asib_jax import streams
from asib_jax.models.ensemble import Networks
from asib_jax.models.kd_model import KDModel, feature_dim


def init_network(model: KDModel, seed: int, name: str, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """{"params", "batch_stats"} of one network, the same for a (seed, name) in every configuration."""
    image = jnp.zeros((1, *image_shape))
    variables = _drawn(functools.partial(model.init, train=False), streams.key(seed, f"init/{name}"), image)
    return {"batch_stats": {}, **variables}  # a network without BatchNorm has none


def init_fusion(nets: Networks, seed: int) -> dict[str, Any]:
    """Parameters of "ib_mbm" and "synergy_head"; none without fusion."""
    if nets.ib_mbm is None:
        return {}
    q = jnp.zeros((1, nets.query_dim))
    kv = jnp.zeros((1, len(nets.teachers), feature_dim(nets.teachers[0])))
    code = jnp.zeros((1, nets.ib_mbm.dim))
    return {"ib_mbm": _drawn(nets.ib_mbm.init, streams.key(seed, "init/ib_mbm"), q, kv)["params"],
            "synergy_head": _drawn(nets.synergy_head.init, streams.key(seed, "init/synergy_head"), code)["params"]}


def _drawn(init: Callable, *arguments: Any) -> dict[str, Any]:
    """Initial values. A CPU's compiler need not optimise what runs once: 2.5 s for a ResNet-8, not 12."""
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(init, compiler_options=quick)(*arguments)
