"""Every program of a run lowers for GPUs and for TPUs, of which none need be here: all is told from shapes."""
import collections
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir

from asib_jax import a_step, b_step, build, recipe as recipes, teachers, train
from asib_jax.data import sources
from asib_jax.data.sources import Split
from asib_jax.engine import feature_bank, parallel
from asib_jax.engine.evaluate import make_eval_step
from asib_jax.engine.feed import Feed
from asib_jax.models.ensemble import Networks, StudentOutputs, TeacherOutputs, Variables
from asib_jax.objectives import state
from asib_jax.objectives.step import Training, make_train_step
from asib_jax.recipe import Recipe
from configs import l2_cccp

PLATFORMS = ("cuda", "tpu")
CALL = 2  # steps of a call, so that it has a loop
SCALARS = ("tau", "beta", "certain", "open", "gate", "average_share", "ramp", "ratio_on")
KEYS = ("augment_key", "noise_key", "mix_key", "dropout_key")
KEY = jax.eval_shape(lambda: jax.random.key(0))


class Program(NamedTuple):
    """A step and the shapes of what it takes; batch: of one step; each: controls that differ between steps."""

    step: Callable
    carry: Any
    fixed: Any
    controls: dict[str, Any]
    batch: dict[str, Any]
    each: dict[str, Any]


def shape(dtype: Any, *dimensions: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dimensions, dtype)


def programs(recipe: Recipe) -> Iterator[tuple[str, Program]]:
    """Everything that a run of the recipe compiles for one device, under a name of its own."""
    sizes = sources.sizes(recipe.dataset.name)
    nets, variables = networks(recipe, sizes)
    size = recipe.dataset.batch_size
    labels = {name: shape(jnp.int32, size) for name in ("label", "index")}
    images = labels | {"image": shape(jnp.uint8, size, *sizes.image_shape)}
    feats = [shape(model.dtype, size, model.architecture.feat_dim) for model in (nets.student, *nets.teachers)]
    student = {"student": StudentOutputs(feats[0], shape(jnp.float32, size, sizes.num_classes))}
    told = {"teachers": TeacherOutputs(tuple(feats[1:]), shape(jnp.float32, size, len(feats) - 1, sizes.num_classes))}
    for k, (name, model) in enumerate(zip(nets.teacher_names, nets.teachers)):
        own = Variables({"student": variables.params[name]}, {"student": variables.batch_stats[name]})
        yield name, training(recipe, teachers.make_training(recipe, k, model, variables.params[name]), own, images)
    fits = a_step.make_training(recipe, nets, variables.params, 0)
    yield "A-Step", training(recipe, fits, variables, images)
    yield "A-Step from banks", training(recipe, fits, variables, labels | told | student)
    distils = b_step.make_training(recipe, nets, variables.params, 0)
    yield "B-Step", training(recipe, distils, variables, images)
    yield "B-Step from banks", training(recipe, distils, variables, images | told)
    counts = {**dict.fromkeys(("student", "synergy", "without_teachers", "examples"), shape(jnp.int32)),
              "rows": shape(jnp.uint32)}
    controls = {"size": shape(jnp.int32)}
    yield "evaluation", Program(make_eval_step(nets), counts, variables, controls, images | told, {})
    for who in ("teachers", "student"):
        yield f"reader of {who}", Program(reader(nets, variables, who), (), variables, {"augment_key": KEY}, images, {})
    recipe = train.without_teachers(recipe)
    nets, variables = networks(recipe, sizes)
    yield "control", training(recipe, b_step.make_training(recipe, nets, variables.params, 0), variables, images)


def networks(recipe: Recipe, sizes: sources.Sizes) -> tuple[Networks, Variables]:
    nets = build.build_networks(recipe, sizes.num_classes)
    return nets, build.variable_shapes(recipe, nets, sizes.image_shape)


def training(recipe: Recipe, made: Training, variables: Variables, batch: dict[str, Any]) -> Program:
    begin = functools.partial(state.begin, mask=made.mask, trained_stats=made.trained_stats, tx=made.tx,
                              compute_dtype=recipe.compute_dtype)
    current, frozen = jax.eval_shape(begin, variables)
    controls = {**dict.fromkeys(SCALARS, shape(jnp.float32)), **dict.fromkeys(KEYS, KEY)}
    each = {"lr": shape(jnp.float32), "step": shape(jnp.int32)}
    return Program(make_train_step(made.loss, made.tx), current, frozen, controls, batch, each)


class Compiled(Exception):
    """Carries the step that was about to be compiled."""


class Catching(Feed):
    """Raises the step in place of compiling it."""

    def compile(self, step: Callable, **_: Any):
        raise Compiled(step)


def reader(nets: Networks, variables: Variables, who: str) -> Callable:
    """The step by which `feature_bank` reads the networks."""
    read = {"teachers": feature_bank.read_teachers, "student": feature_bank.read_student}[who]
    split = Split(np.zeros((1, 1, 1, 3), np.uint8), np.zeros(1, np.int32), np.zeros(1, np.int32))
    with pytest.raises(Compiled) as caught:
        read(nets, variables, split, keys=[jax.random.key(0)], data_aug=1, batch_size=1,
             feed=Catching(tuple(jax.devices()[:1]), room_gb=0))
    return caught.value.args[0]


def lowered(program: Program, platforms: tuple[str, ...] = PLATFORMS) -> dict[str, str]:
    """By platform, the text of the program that a run would compile for one device."""
    def steps(tree):
        return jax.tree.map(lambda leaf: shape(leaf.dtype, CALL, *leaf.shape), tree)

    (size,) = program.batch["label"].shape
    call = parallel.compile_steps(program.step, jax.devices()[:1])
    traced = call.trace(program.carry, program.fixed, program.controls, {}, steps(program.batch),
                        shape(jnp.int32, CALL, size), steps(program.each), shape(jnp.int32))
    return {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in platforms}


def products(text: str) -> collections.Counter:
    """How many convolutions and matrix products there are, by the type of their operands and whether that is kept."""
    lines = [line for line in text.splitlines() if "stablehlo.convolution(" in line or "stablehlo.dot_general" in line]
    found = collections.Counter()
    for line in lines:
        (operand,) = re.findall(r": \(tensor<(?:\d+x)*(\w+)>", line)
        found[operand, len(re.findall("HIGHEST", line)) == 2] += 1
    return found


@pytest.mark.parametrize("profile", ["digits", pytest.param("", marks=pytest.mark.slow)])
def test_every_program_of_a_run_lowers(profile):
    names = []
    for name, program in programs(recipes.read(l2_cccp.get_config(profile))):
        names.append(name)
        for platform, text in lowered(program).items():
            found = products(text)
            assert found and not found["f32", False], (name, platform, found)  # float32 is not TF32, nor bfloat16
            assert "custom_call" not in text, (name, platform)  # nothing but XLA is needed
    assert names == ["teacher1", "teacher2", "A-Step", "A-Step from banks", "B-Step", "B-Step from banks", "evaluation",
                     "reader of teachers", "reader of student", "control"]


def test_what_only_a_cpu_can_do_does_not_lower():
    """Which is what the test above would say of such an operation, wherever it is in a step."""
    only_cpu = Primitive("only_cpu")
    only_cpu.def_abstract_eval(lambda x: x)
    mlir.register_lowering(only_cpu, lambda context, x: [x], platform="cpu")
    program = Program(lambda carry, fixed, controls, batch: (only_cpu.bind(carry), batch["label"]), shape(jnp.float32),
                      (), {}, {"label": shape(jnp.int32, 4)}, {})
    assert "module" in lowered(program, ("cpu",))["cpu"]
    for platform in PLATFORMS:
        with pytest.raises(NotImplementedError, match=f"only_cpu.*{platform}"):
            lowered(program, (platform,))


def test_a_product_of_lower_precision_is_found():
    call = jax.jit(lambda x: jax.lax.dot(x, x, precision=jax.lax.Precision.DEFAULT))
    text = call.trace(shape(jnp.float32, 2, 2)).lower(lowering_platforms=("cuda",)).as_text()
    assert products(text) == {("f32", False): 1}
