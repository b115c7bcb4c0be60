"""The fusion network against a float64 numpy re-implementation and PyTorch's attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asib_jax.models.ib_mbm import IB_MBM, Latent, SynergyHead, TeacherAttention, sample

BATCH, TEACHERS, DIM, HEADS = 5, 3, 8, 2
GENERATOR = np.random.default_rng(0)
QUERY = GENERATOR.normal(size=(BATCH, 6)).astype(np.float32)
FEATURES = GENERATOR.normal(size=(BATCH, TEACHERS, 7)).astype(np.float32)


def make(**fields):
    return IB_MBM(
        **{
            "dim": DIM,
            "num_heads": HEADS,
            "use_ib": True,
            "feature_norm": "none",
            "logvar_clip": 6.0,
            "min_std": 1e-3,
            "residual": True,
        }
        | fields
    )


def random_variables(module, *inputs, seed=1):
    """Variables of the module's shapes in which nothing is at its initial value."""
    generator = np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), shapes)


def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0)


def layer_norm(x, p):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def attention_by_hand(query, teachers, p, heads):
    """One example and one head at a time: softmax(k q / sqrt(d / heads)) over teachers."""
    q, k, v = dense(query, p["query"]), dense(teachers, p["key"]), dense(teachers, p["value"])
    width = q.shape[-1] // heads
    read = np.empty_like(q)
    for b in range(len(q)):
        for h in range(heads):
            own = slice(h * width, (h + 1) * width)
            score = k[b, :, own] @ q[b, own] / np.sqrt(width)
            weight = np.exp(score) / np.exp(score).sum()
            read[b, own] = weight @ v[b, :, own]
    return dense(read, p["out"])


@pytest.mark.parametrize(
    "fields", [{}, {"feature_norm": "l2", "logvar_clip": 0.7}, {"use_ib": False, "residual": False}, {"min_std": 0.9}]
)
def test_equals_numpy(fields):
    """mu, logvar and the clipped share to 1e-4 of float64; the variants clip on both sides, on one, or not at all."""
    model = make(**fields)
    variables = random_variables(model, QUERY, FEATURES)
    actual = jax.jit(model.apply)(variables, QUERY, FEATURES)

    p = jax.tree.map(np.float64, variables["params"])
    q, kv = np.float64(QUERY), np.float64(FEATURES)
    if model.feature_norm == "l2":
        q, kv = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, kv))
    query = dense(q, p["query"])
    s = attention_by_hand(
        layer_norm(query, p["query_norm"]),
        layer_norm(dense(kv, p["teachers"]), p["teachers_norm"]),
        p["attention"],
        HEADS,
    )
    s = layer_norm(s + query, p["norm"]) if model.residual else s
    np.testing.assert_allclose(actual.mu, dense(s, p["mu"]), rtol=1e-4, atol=1e-4)
    assert ("norm" in p) == model.residual
    if not model.use_ib:
        assert actual.logvar is None and actual.clipped is None and "logvar" not in p
        return
    raw = dense(s, p["logvar"])
    low, high = max(-model.logvar_clip, 2 * np.log(model.min_std)), model.logvar_clip
    np.testing.assert_allclose(actual.logvar, np.clip(raw, low, high), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(actual.clipped, ((raw < low) | (raw > high)).mean(-1), rtol=1e-6)
    if fields:
        assert 0 < actual.clipped.mean() < 1


@pytest.mark.pytorch
def test_attention_equals_pytorch():
    """nn.MultiheadAttention with its key bias set to anything: it changes nothing, so we have none. 1e-5."""
    import torch

    query = GENERATOR.normal(size=(BATCH, DIM)).astype(np.float32)
    teachers = GENERATOR.normal(size=(BATCH, TEACHERS, DIM)).astype(np.float32)
    module = TeacherAttention(HEADS)
    variables = random_variables(module, query, teachers)
    p = variables["params"]
    assert set(p["key"]) == {"kernel"}
    theirs = torch.nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    theirs.load_state_dict(
        {
            name: torch.tensor(value)
            for name, value in {
                "in_proj_weight": np.concatenate([p[name]["kernel"].T for name in ("query", "key", "value")]),
                "in_proj_bias": np.concatenate([p["query"]["bias"], np.full(DIM, 3, np.float32), p["value"]["bias"]]),
                "out_proj.weight": p["out"]["kernel"].T,
                "out_proj.bias": p["out"]["bias"],
            }.items()
        }
    )
    with torch.no_grad():
        expected, _ = theirs(*(torch.tensor(x) for x in (query[:, None], teachers, teachers)))
    np.testing.assert_allclose(module.apply(variables, query, teachers), expected[:, 0], rtol=1e-5, atol=1e-5)


def test_initial_distributions():
    """Uniform within PyTorch's bounds: support and spread (5 % over 1,600 draws); biases of the attention zero."""
    params = jax.jit(make(dim=40).init)(jax.random.key(0), QUERY, FEATURES)["params"]
    attention, joint = params["attention"], (6 / (40 + 3 * 40)) ** 0.5
    for kernel, bound in (
        (params["query"]["kernel"], 6**-0.5),
        (params["teachers"]["kernel"], 7**-0.5),
        (params["mu"]["kernel"], 40**-0.5),
        (params["logvar"]["kernel"], 40**-0.5),
        (attention["query"]["kernel"], joint),
        (attention["key"]["kernel"], joint),
        (attention["value"]["kernel"], joint),
        (attention["out"]["kernel"], 40**-0.5),
    ):
        assert 0.95 * bound < np.abs(kernel).max() <= bound
        np.testing.assert_allclose(np.std(kernel), bound / np.sqrt(3), rtol=0.05 if kernel.size >= 1600 else 0.15)
    for name in ("query", "value", "out"):
        np.testing.assert_array_equal(attention[name]["bias"], 0)
    assert 0 < np.abs(params["query"]["bias"]).max() <= 6**-0.5


def test_l2_norm_of_a_zero_feature_has_a_finite_gradient():
    model = make(feature_norm="l2")
    variables = random_variables(model, QUERY, FEATURES)
    gradient = jax.jit(jax.grad(lambda kv: model.apply(variables, QUERY, kv).mu.sum()))(jnp.zeros_like(FEATURES))
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_sample():
    """z = mu + std * noise, with std = exp(logvar / 2) written as a power of two."""
    latent = Latent(np.float32([[1, 2]]), np.log(np.float32([[4, 0.25]])), None)
    np.testing.assert_allclose(sample(latent, np.float32([[3, -2]])), [[1 + 2 * 3, 2 - 0.5 * 2]], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 3}, "ib_mbm_n_head = 3 does not divide ib_mbm_out_dim = 8"),
        ({"feature_norm": "l1"}, "ib_mbm_feature_norm = 'l1' must be one of none, l2"),
    ],
)
def test_impossible_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


def test_synergy_head_equals_numpy():
    """Two layers, divided by exp(t) with a learnable temperature, which starts at t = 0; no dropout without keys."""
    z = GENERATOR.normal(size=(BATCH, DIM)).astype(np.float32)
    for learnable in (False, True):
        head = SynergyHead(num_classes=4, dim=DIM, dropout=0.5, learnable_temperature=learnable)
        variables = random_variables(head, z)
        p = jax.tree.map(np.float64, variables["params"])
        expected = dense(np.maximum(dense(np.float64(z), p["fc1"]), 0), p["fc2"]) / np.exp(p.get("log_temperature", 0))
        np.testing.assert_allclose(head.apply(variables, z), expected, rtol=1e-5, atol=1e-5)
    assert head.init(jax.random.key(0), z)["params"]["log_temperature"] == 0


def test_dropout_is_keyed_per_example():
    """The mask belongs to the key, not to the place in the batch; kept units are scaled by 1 / (1 - p)."""
    dim, dropout = 400, 0.25
    head = SynergyHead(num_classes=dim, dim=dim, dropout=dropout, learnable_temperature=False)
    ones = {"kernel": np.eye(dim, dtype=np.float32), "bias": np.zeros(dim, np.float32)}
    variables = {"params": {"fc1": ones, "fc2": ones}}  # the logits are the dropped-out input itself
    z = np.ones((3, dim), np.float32)
    keys = jax.random.split(jax.random.key(0), 3)
    dropped = np.asarray(jax.jit(head.apply)(variables, z, dropout_keys=keys))
    assert set(np.unique(dropped)) == {0, np.float32(1 / (1 - dropout))}
    assert abs((dropped > 0).mean() - (1 - dropout)) < 3 * np.sqrt(dropout * (1 - dropout) / dropped.size)
    assert (dropped[0] != dropped[1]).any()
    swapped = jax.jit(head.apply)(variables, z[:1], dropout_keys=keys[2:])
    np.testing.assert_array_equal(swapped[0], dropped[2])
