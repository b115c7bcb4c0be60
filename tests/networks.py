"""Networks of three convolutions and data they can learn: what several test files run steps and stages on."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from asib_jax.data.sources import Split
from asib_jax.engine import devices as devices_
from asib_jax.engine.compiled import Steps
from asib_jax.engine.feed import Feed
from asib_jax.models import MODELS, build_ib_mbm_from_teachers
from asib_jax.models.ensemble import Networks, Variables
from asib_jax.models.kd_model import KDModel, feature_dim
from asib_jax.models.layers import Architecture, ConvNorm

CLASSES, DIM = 5, 8


def convolutions(*widths: int) -> Architecture:
    """One convolution, BatchNorm and relu per stage; every stage but the first halves the resolution."""
    stages = tuple(
        (f"stage{i}", partial(ConvNorm, kernel=3, width=width, stride=min(i + 1, 2))) for i, width in enumerate(widths)
    )
    return Architecture(stages, feat_dim=widths[-1])


STUDENT, TEACHERS = convolutions(3, 4, 4), (convolutions(3, 6), convolutions(4, 5))
SHALLOW = {"student": convolutions(3), "teachers": (convolutions(3), convolutions(4))}  # compiles faster still


def make_networks(
    *,
    adapter_dim: int = DIM,
    student_feature: str = "distill_feat",
    use_ib: bool = True,
    dropout: float = 0.0,
    base: str = "none",
    joins: bool = False,
    axis_name: str | None = None,
    student: Architecture = STUDENT,
    teachers: tuple[Architecture, ...] = TEACHERS,
    classes: tuple[tuple[int, ...], ...] = (),
) -> Networks:
    """A student, teachers, IB_MBM and head. The networks differ in `mean`. base: of the head; joins: whether teachers
    are read by their probabilities, too; classes: those that each teacher knows."""
    fields = {"num_classes": CLASSES, "std": (0.3,), "adapter_dim": adapter_dim, "axis_name": axis_name}
    student = KDModel(student, mean=(0.5,), **fields)
    models = tuple(
        KDModel(teacher, mean=(0.4 + k / 100,), classes=known, joins_probabilities=joins, **fields)
        for k, (teacher, known) in enumerate(zip(teachers, classes or ((),) * len(teachers), strict=True), 1)
    )
    ib_mbm, head = build_ib_mbm_from_teachers(
        models,
        dim=DIM,
        num_heads=2,
        use_ib=use_ib,
        feature_norm="none",
        logvar_clip=6.0,
        min_std=1e-3,
        residual=True,
        dropout=dropout,
        learnable_temperature=False,
        base=base,
    )
    return Networks(student, models, ib_mbm, head, student_feature)


def variable_shapes(model: KDModel, size: int = 8):
    """The variables by shape alone, for colour images of this many pixels."""
    return jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, size, size, 3)))


@cache
def full_size_shapes(name: str, classes: int, small_input: bool):
    """The variables of a network of MODELS, by shape alone."""
    return variable_shapes(KDModel(MODELS[name](small_input), classes, (0.5,), (0.25,)), 32)


def stage_shapes(architecture: Architecture, size: int) -> list[tuple[str, int, int]]:
    """(name, height, channels) of each stage's square output, in order, for colour images of this many pixels."""
    shapes, x = [], jnp.zeros((1, size, size, 3))
    for name, factory in architecture.stages:
        stage = factory(dtype=jnp.float32, axis_name=None)
        x, _ = jax.eval_shape(partial(stage.init_with_output, train=False), jax.random.key(0), x)
        batch, height, width, channels = x.shape
        assert (batch, height) == (1, width)
        shapes.append((name, height, channels))
    return shapes


def random_values(shapes, seed: int = 3):
    """Values no initialiser gives, of a size at which networks with different weights disagree."""
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return generator.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        spread = 1.5 / np.sqrt(np.prod(leaf.shape[:-1])) if path[-1].key == "kernel" else 0.3
        return (spread * generator.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_variables(nets: Networks, seed: int = 3) -> Variables:
    """`random_values` of all networks, centred as said below."""

    def shapes(init, *inputs):
        return jax.eval_shape(init, jax.random.key(0), *inputs)

    models = {"student": nets.student, **dict(zip(nets.teacher_names, nets.teachers))}
    trees = {name: variable_shapes(model) for name, model in models.items()}
    if nets.ib_mbm is not None:
        adapted = nets.student_feature == "distill_feat"
        width = nets.student.adapter_dim if adapted else nets.student.architecture.feat_dim
        read = feature_dim(nets.teachers[0])
        trees["ib_mbm"] = shapes(nets.ib_mbm.init, jnp.zeros((1, width)), jnp.zeros((1, len(models) - 1, read)))
        logs = jnp.zeros((1, *nets.known.shape))
        trees["synergy_head"] = shapes(partial(nets.synergy_head.init, known=nets.known), jnp.zeros((1, DIM)), logs)
    trees = random_values(trees, seed)
    variables = Variables(
        {name: tree["params"] for name, tree in trees.items()},
        {name: trees[name].get("batch_stats", {}) for name in models},
    )
    for name, model in models.items():  # centred and spread, or one class wins on every image and codes hardly differ
        params, pixels = variables.params[name], jnp.float32(make_split(16).image)
        for layer in [params["classifier"]] + ([params["distill_adapter"]["fc2"]] if model.adapter_dim else []):
            layer["kernel"], layer["bias"] = 6 * layer["kernel"], 0 * layer["bias"]
        outputs = model.apply(variables.of(name), pixels, train=False)
        params["classifier"]["bias"] = -np.mean(outputs.logit, axis=0)[np.array(model.classes or range(CLASSES))]
        if model.adapter_dim:
            params["distill_adapter"]["fc2"]["bias"] = -np.mean(outputs.distill_feat, axis=0)
    return variables


def make_split(count: int, classes: int = CLASSES, seed: int = 0, first_index: int = 1000) -> Split:
    """Noise on a colour of the class's own, 8x8; data-set indices that are not the rows."""
    generator = np.random.default_rng(seed)
    label = (np.arange(count) % classes).astype(np.int32)
    colour = np.random.default_rng(99).integers(0, 256, (classes, 1, 1, 3))
    image = np.clip(colour[label] + generator.normal(0, 50, (count, 8, 8, 3)), 0, 255).astype(np.uint8)
    return Split(image, label, first_index + np.arange(count, dtype=np.int32))


def make_batch(count: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    """The whole of `make_split` as a batch."""
    return make_split(count, seed=seed)._asdict()


def make_feed(devices: int = 1, **options) -> Feed:
    """The first devices, with room for everything unless `options` say otherwise."""
    return Feed(tuple(devices_.run_devices(devices)), **{"room_gb": 1.0} | options)


def one_step(steps: Steps, feed: Feed, carry, fixed, controls, batch):
    """A single step of what `feed.compile` gave, on a batch of arrays."""
    (call,) = feed.calls(steps, np.arange(len(batch["label"]))[None], feed.place(**batch))
    carry, outputs = steps.run(carry, fixed, controls, call, {})
    return carry, jax.tree.map(lambda x: x[0], outputs)
