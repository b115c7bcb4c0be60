"""Every program of a run lowers for GPUs and for TPUs, of which none need be here: all is told from shapes."""

import collections
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir

from asib_jax import build, recipe as recipes, train
from asib_jax.data import sources
from asib_jax.data.statistics import Statistics
from asib_jax.engine.banks import make_reader
from asib_jax.engine.compiled import compile_steps
from asib_jax.engine.evaluate import make_eval_step, of_fusion
from asib_jax.engine.progress import Progress
from asib_jax.models.ensemble import Variables, with_narrow_teachers
from asib_jax.objectives import state
from asib_jax.objectives.step import make_train_step
from asib_jax.phases import Phase
from asib_jax.recipe import Recipe, told_by_data
from asib_jax.tools import plan
from configs import l2_cccp, specialists

PLATFORMS = ("cuda", "tpu")
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
    sizes, size = sources.sizes(recipe.dataset.name), recipe.dataset.batch_size
    recipe = told_by_data.complete(recipe, sizes.num_classes, lambda: Statistics((0.5,), (0.25,)))
    nets = build.build_networks(recipe, sizes.num_classes)
    variables = build.variable_shapes(recipe, nets, sizes.image_shape)
    phases = train.phases_of(
        recipe,
        nets,
        variables.params,
        images={"train": 1000, "teacher_train": 1000},
        train=dict.fromkeys(nets.teacher_names),
        calibrate=True,
    )
    known = set()
    for phase in phases:
        if (phase.optimizer, str(phase.training.mask)) not in known:
            known.add((phase.optimizer, str(phase.training.mask)))
            yield phase.name, training(recipe, phase, variables, plan.batch_shapes(sizes, size, phase.nets))
            if phase.reads:
                stored = plan.batch_shapes(sizes, size, phase.nets, phase.reads)
                yield f"{phase.name} from banks", training(recipe, phase, variables, stored)
    batch = plan.batch_shapes(sizes, size, nets)
    counts = {**dict.fromkeys(("student", *of_fusion(nets), "examples"), shape(jnp.int32)), "rows": shape(jnp.uint32)}
    evaluated = batch | {"teachers": (plan.batch_shapes(sizes, size, nets, frozenset({"teachers"}))["teachers"],)}
    controls = {"size": shape(jnp.int32), "temperatures": shape(jnp.float32, len(nets.teachers))}
    yield "evaluation", Program(make_eval_step(nets), counts, variables, controls, evaluated, {})
    for who in ("teachers", "student"):
        step = make_reader(nets, who, recipe.dataset.data_aug)
        yield f"reader of {who}", Program(step, (), variables, {"augment_key": KEY}, batch, {})


def training(recipe: Recipe, phase: Phase, variables: Variables, batch: dict[str, Any]) -> Program:
    own = variables.only(phase.uses)
    begin = functools.partial(
        state.begin,
        mask=phase.training.mask,
        trained_stats=phase.training.trained_stats,
        tx=phase.training.tx,
        compute_dtype=recipe.compute_dtype,
    )
    current, frozen = jax.eval_shape(lambda own: begin(with_narrow_teachers(phase.nets, own)), own)
    controls = jax.eval_shape(lambda: phase.controls(Progress(), 0))
    each = {"lr": shape(jnp.float32), "step": shape(jnp.int32)}
    return Program(make_train_step(phase.training.loss, phase.training.tx), current, frozen, controls, batch, each)


def lowered(program: Program, platforms: tuple[str, ...] = PLATFORMS) -> dict[str, str]:
    """By platform, the text of the program that a run compiles for one device, of a call of two steps in a loop."""

    def steps(tree):
        return jax.tree.map(lambda leaf: shape(leaf.dtype, 2, *leaf.shape), tree)

    rows = shape(jnp.int32, 2, *program.batch["label"].shape)
    call = compile_steps(program.step, jax.devices()[:1])
    traced = call.trace(
        program.carry, program.fixed, program.controls, {}, steps(program.batch), rows, steps(program.each)
    )
    return {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in platforms}


def products(text: str) -> collections.Counter:
    """How many convolutions and matrix products there are, by the type of their operands and whether that is kept."""
    lines = [line for line in text.splitlines() if "stablehlo.convolution(" in line or "stablehlo.dot_general" in line]
    found = collections.Counter()
    for line in lines:
        (operand,) = re.findall(r": \(tensor<(?:\d+x)*(\w+)>", line)
        found[operand, len(re.findall("HIGHEST", line)) == 2] += 1
    return found


@pytest.mark.parametrize(
    "config, profile", [(l2_cccp, "digits"), (specialists, "digits"), pytest.param(l2_cccp, "", marks=pytest.mark.slow)]
)
def test_every_program_of_a_run_lowers(config, profile):
    names = []
    for name, program in programs(recipes.read(config.get_config(profile))):
        names.append(name)
        for platform, text in lowered(program).items():
            found = products(text)
            assert found and not found["f32", False], (name, platform, found)  # float32 is not TF32, nor bfloat16
            assert "custom_call" not in text, (name, platform)  # nothing but XLA is needed
    assert {
        "teacher1",
        "teacher2",
        "calibration",
        "stage1/a",
        "stage1/a from banks",
        "stage1/b",
        "evaluation",
        "reader of teachers",
        "reader of student",
    } <= set(names)


def test_what_only_a_cpu_can_do_does_not_lower():
    """Which is what the test above would say of such an operation, wherever it is in a step."""
    only_cpu = Primitive("only_cpu")
    only_cpu.def_abstract_eval(lambda x: x)
    mlir.register_lowering(only_cpu, lambda context, x: [x], platform="cpu")
    program = Program(
        lambda carry, fixed, controls, batch: (only_cpu.bind(carry), batch["label"]),
        shape(jnp.float32),
        (),
        {},
        {"label": shape(jnp.int32, 4)},
        {},
    )
    assert "module" in lowered(program, ("cpu",))["cpu"]
    for platform in PLATFORMS:
        with pytest.raises(NotImplementedError, match=f"only_cpu.*{platform}"):
            lowered(program, (platform,))


def test_a_product_of_lower_precision_is_found():
    call = jax.jit(lambda x: jax.lax.dot(x, x, precision=jax.lax.Precision.DEFAULT))
    text = call.trace(shape(jnp.float32, 2, 2)).lower(lowering_platforms=("cuda",)).as_text()
    assert products(text) == {("f32", False): 1}
