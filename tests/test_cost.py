"""Costs told from shapes, against counts by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest
from networks import CLASSES, SHALLOW, make_batch

from asib_jax.models.ensemble import Mode, Networks, Variables
from asib_jax.models.kd_model import KDModel
from asib_jax.objectives import optimizers
from asib_jax.objectives.b_loss import BTerms, b_loss
from asib_jax.objectives.step import Training
from asib_jax.tools import cost

X, W1, W2 = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 3), (3, 5), (5, 2)))


@pytest.mark.parametrize(
    "activation, kept",
    [
        (jnp.tanh, 2 * 8 * 5 * 4),  # its output a, which multiplies the second kernel's gradient too, and 1 - a
        (
            jax.nn.relu,
            8 * 5 * 4 + 8 * 5,
        ),  # its output, and one byte a sign; the zeros of its other branch are a constant
    ],
)
def test_activations_of_two_layers(activation, kept):
    """Beside what is kept the first layer's output exists for a while, 8 * 5 floats: more than the second's 8 * 2."""

    def loss(params, x):
        return jnp.sum(activation(x @ params[0]) @ params[1])

    assert cost.activations(loss, (W1, W2), X) == cost.Activations(kept, 8 * 5 * 4)


def test_what_comes_before_the_trained_layer_is_not_kept():
    def loss(w2, w1, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ w1)) @ w2)

    assert cost.activations(loss, W2, W1, X) == cost.Activations(8 * 5 * 4, 2 * 8 * 5 * 4)


def test_flops_count_a_multiply_add_twice_and_no_padding():
    assert cost.flops(lambda x, w: x @ w, X, W1) == 2 * 8 * 3 * 5
    image, kernel = jnp.zeros((1, 8, 8, 3)), jnp.zeros((3, 3, 3, 4))

    def convolution(padding):
        return lambda image, kernel: jax.lax.conv_general_dilated(
            image, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert cost.flops(convolution("VALID"), image, kernel) == 2 * 6 * 6 * 3 * 3 * 3 * 4
    # Along each axis the two outer positions of eight meet two entries of the kernel, the others three: 22 in all.
    assert cost.flops(convolution("SAME"), image, kernel) == 2 * 22 * 22 * 3 * 4


def test_a_step_of_a_tiny_network():
    """AdamW: two moments of every trained parameter and one step count; running statistics are updated, too."""
    model = KDModel(SHALLOW["student"], CLASSES, mean=(0.5,), std=(0.3,))
    drawn = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    own = Variables({"student": drawn["params"]}, {"student": drawn["batch_stats"]})
    tx = optimizers.make_optimizer("adamw", weight_decay=0.1, grad_clip_norm=1.0)
    mask = {"student": {"stage0": True, "classifier": False}}

    def loss(variables, controls, batch):
        return b_loss(variables, controls, batch, nets=Networks(model), terms=BTerms(0), mode=Mode(train=True))

    controls = {f"{name}_key": jax.eval_shape(lambda: jax.random.key(0)) for name in ("augment", "mix", "dropout")}
    controls["step"] = jax.ShapeDtypeStruct((), jnp.int32)
    found = cost.of_step(Training(loss, mask, ("student",), tx), own, controls, jax.eval_shape(make_batch), "float32")
    trained = 3 * 3 * 3 * 3 + 2 * 3  # a 3x3 convolution of 3 channels without bias; scale and bias of its BatchNorm
    assert found.trained == {"student": trained} and found.gradients == 4 * trained
    assert found.state == 4 * (3 * trained + 1 + 2 * 3)
    assert found.activations.kept > 8 * 8 * 8 * 3 * 4  # at least the convolution's output for 8 images of 8x8 pixels
