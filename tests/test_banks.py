"""Banks: what is held is what running the networks would give, and a cache is only hit by the same question."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import SHALLOW, make_feed, make_networks, make_split, random_variables

from asib_jax import streams
from asib_jax.data.augment import augment
from asib_jax.engine.banks import Bank
from asib_jax.engine.evaluate import correct_counts
from asib_jax.models.ensemble import run_student, run_teachers
from asib_jax.objectives import inputs, optimizers, state
from asib_jax.objectives.a_loss import ATerms, a_loss
from asib_jax.objectives.b_loss import BTerms, b_loss
from asib_jax.objectives.step import make_train_step

SPLIT = make_split(21)
KEYS = [streams.key(0, "augment", 0, view) for view in range(2)]
A_TERMS = ATerms(
    synergy_ce_alpha=0.6,
    synergy_kd_alpha=1.0,
    kd_alpha=0.0,
    cccp_alpha=0.0,
    cccp_tau=4.0,
    feat_kd_alpha=0.0,
    reg_lambda=0.0,
    ib_mbm_reg_lambda=0.0,
    label_smoothing=0.0,
    min_cw=0.1,
    data_aug=1,
)
B_TERMS = BTerms(data_aug=1, ce_alpha=0.65, kd_alpha=0.35, kd_target="synergy", kd_max_ratio=2.0)
pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def make():
    """Of which the teachers know some classes each."""
    nets = make_networks(**SHALLOW, base="mixture", joins=True, classes=((0, 1, 2, 3), (1, 4, 3, 2)))
    return nets, random_variables(nets)


def build(
    split=SPLIT, *, variables=None, nets=None, devices=1, keys=KEYS, data_aug=1, cache="", who="teachers", **options
):
    feed = make_feed(devices, **{"eval_batch": 8} | options)
    bank = Bank(
        nets or make()[0],
        split,
        feed,
        name="a split",
        key=lambda view: keys[view[1]],
        data_aug=data_aug,
        cache=str(cache),
    )
    return bank.read(who, variables or make()[1], [(0, number) for number in range(len(keys))])


@functools.cache
def stored():
    return build()


def assert_close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), actual, expected)


@pytest.mark.parametrize("devices, room_gb, steps", [(1, 1, 32), (1, 0, 2), (4, 1, 2), (4, 0, 32)])
def test_outputs_are_those_of_the_networks_on_each_view(devices, room_gb, steps):
    """Of teachers and student; views differ; every image of an incomplete batch is there, wherever the images lie and
    however many batches a call takes. 1e-5."""
    options = {"devices": devices, "room_gb": room_gb, "steps": steps, "eval_batch": 4}
    views, students = build(**options), build(who="student", **options)
    for key, view, student in zip(KEYS, views, students, strict=True):
        assert view.logits.shape == (21, 2, 5) and [feat.shape for feat in view.feats] == [(21, 3), (21, 4)]
        assert_close((view, student), streamed(key))
    for view in views:
        np.testing.assert_array_equal(np.isfinite(view.logits), np.broadcast_to(make()[0].known, (21, 2, 5)))
    one, other = (view.logits[:, make()[0].known] for view in views)
    assert np.abs(one - other).max() > 0.1


@jax.jit
def streamed(key):
    nets, variables = make()
    pixels = augment(key, SPLIT.index, SPLIT.image, 1)
    return run_teachers(nets, variables, pixels)[0], run_student(nets, variables, pixels)


def test_what_is_stored_has_the_compute_type_as_what_is_streamed(tmp_path):
    """bfloat16 features, float32 logits, from the networks, stored, and bitwise the same from the cache."""
    nets, variables = make()
    half = replace(
        nets,
        teachers=tuple(model.clone(dtype=jnp.bfloat16) for model in nets.teachers),
        student=nets.student.clone(dtype=jnp.bfloat16),
    )
    (view,), (again,) = (build(nets=half, keys=KEYS[:1], cache=tmp_path) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, view, again)
    streamed_teachers, _ = jax.eval_shape(lambda: run_teachers(half, variables, jnp.float32(SPLIT.image)))
    streamed_student = jax.eval_shape(lambda: run_student(half, variables, jnp.float32(SPLIT.image)))
    feats = (*view.feats, *streamed_teachers.feats, streamed_student.feat)
    assert {feat.dtype for feat in feats} == {jnp.dtype("bfloat16")}
    assert {view.logits.dtype, streamed_teachers.logits.dtype, streamed_student.logit.dtype} == {np.dtype("float32")}
    for feat, wanted in zip(view.feats, stored()[0].feats):
        np.testing.assert_allclose(np.float32(feat), wanted, rtol=0.1, atol=0.05 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", ["a", "b"])
def test_a_step_from_the_bank_is_the_plain_step(kind):
    """One update by SGD gives the same parameters, to 1e-5, as running the teachers on that view of the images."""
    nets, variables = make()
    names = ("ib_mbm", "synergy_head") if kind == "a" else ("student",)
    loss = (
        functools.partial(a_loss, nets=nets, terms=A_TERMS, trained=None)
        if kind == "a"
        else functools.partial(b_loss, nets=nets, terms=B_TERMS)
    )
    tx = optimizers.make_optimizer("sgd", weight_decay=0.0, grad_clip_norm=0.0)
    step = jax.jit(make_train_step(loss, tx))
    values = {
        "tau": 3.0,
        "beta": 1e-3,
        "open": 1.0,
        "certain": 1.0,
        "gate": 1.0,
        "average_share": 0.0,
        "ramp": 1.0,
        "ratio_on": 1.0,
        "lr": 0.1,
        "temperatures": np.array([1.5, 0.5]),
    }
    controls = {
        **jax.tree.map(np.float32, values),
        "step": np.int32(0),
        "augment_key": KEYS[1],
        "noise_key": streams.key(0, "noise"),
        "dropout_key": streams.key(0, "dropout"),
        "mix_key": streams.key(0, "mix"),
    }
    rows = np.arange(1, 17, 2)
    plain = {name: leaf[rows] for name, leaf in SPLIT._asdict().items()}

    def outputs(view):
        return jax.tree.map(lambda leaf: leaf[rows], stored()[view])

    def after(batch):
        current, frozen = state.begin(variables, {name: name in names for name in variables.params}, (), tx)
        return step(current, frozen, controls, batch)[0].params

    expected, other_view = after(plain), after(plain | {"teachers": outputs(0)})
    actual = after(plain | {"teachers": outputs(1)})
    assert_close(actual, expected)
    assert max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(other_view), jax.tree.leaves(expected))) > 1e-4


def changed(variables, *path):
    """The variables with one leaf, addressed by attribute and names, moved a little."""
    copy = jax.tree.map(np.copy, variables)
    branch = getattr(copy, path[0])
    for name in path[1:-1]:
        branch = branch[name]
    branch[path[-1]] = branch[path[-1]] + np.float32(1e-3)
    return copy


def other_image():
    image = SPLIT.image.copy()
    image[5, 0, 0, 0] ^= 1
    return SPLIT._replace(image=image)


def test_cache_answers_the_same_question_only(tmp_path):
    """The stored files are marked; whoever gets the mark was answered from them."""
    nets, variables = make()
    jax.tree.map(np.testing.assert_array_equal, build(cache=tmp_path), stored())
    for file in tmp_path.iterdir():
        with np.load(file) as arrays:
            marked = {**arrays, "logits": np.full_like(arrays["logits"], 7)}
        np.savez(file, **marked)

    def answered(**options):
        marks = [bool((view.logits == 7).all()) for view in build(**{"cache": tmp_path} | options)]
        assert len(set(marks)) == 1
        return marks[0]

    assert answered()
    assert answered(devices=4)
    with jax.default_matmul_precision("bfloat16"):  # who asks has settings of jax; the library computes as ever
        assert answered()
    assert answered(keys=KEYS[::-1]) and answered(keys=KEYS[1:])  # each view is a file of its own
    assert answered(variables=changed(variables, "params", "teacher1", "distill_adapter", "fc1", "bias"))
    assert answered(variables=changed(variables, "params", "student", "classifier", "bias"))
    wider = replace(nets, teachers=(nets.teachers[0].clone(mean=(0.6,)), nets.teachers[1]))
    small = SHALLOW["teachers"][0]
    coarse = small._replace(stages=((small.stages[0][0], functools.partial(small.stages[0][1], stride=2)),))
    coarser = replace(nets, teachers=(nets.teachers[0].clone(architecture=coarse), nets.teachers[1]))
    for question in (
        {"variables": changed(variables, "params", "teacher2", "stage0", "conv", "kernel")},
        {"variables": changed(variables, "batch_stats", "teacher1", "stage0", "bn", "var")},
        {"split": other_image()},
        {"split": SPLIT._replace(index=SPLIT.index + 1)},
        {"data_aug": 3},
        {"keys": [streams.key(0, "augment", 1, view) for view in range(2)]},
        {"nets": wider},
        {"nets": coarser},
    ):
        assert not answered(**question)
    assert len(list(tmp_path.iterdir())) == 2 * 9


def test_damaged_file_in_the_cache_is_named(tmp_path):
    build(cache=tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{tmp_path}/\w+\.npz \(in teacher_cache\) cannot be read, delete it"):
        build(cache=tmp_path)


def test_logits_of_16_bit_networks_are_held_in_16_bits():
    """Of bfloat16 networks float16's rounding of the logits, 2^-11, the same class everywhere; of float32 ones all
    bits; and a step reads either as float32."""
    nets, variables = make()
    half = replace(
        nets,
        teachers=tuple(model.clone(dtype=jnp.bfloat16) for model in nets.teachers),
        student=nets.student.clone(dtype=jnp.bfloat16),
    )
    for networks, kind, rounding in ((nets, np.float32, 0), (half, np.float16, 2**-11)):
        bank = Bank(networks, SPLIT, make_feed(), name="a split", narrow=True)
        (read,), (student,) = bank.read("teachers", variables), bank.read("student", variables)
        held = {"teachers": bank.of("teachers").host["teachers"], "student": bank.of("student").host["student"]}
        assert held["teachers"].logits.dtype == held["student"].logit.dtype == kind and read.logits.dtype == np.float32
        for a, b in ((held["teachers"].logits, read.logits), (held["student"].logit, student.logit)):
            np.testing.assert_allclose(a.astype(np.float32), b, rtol=rounding, atol=1e-7)
            np.testing.assert_array_equal(a.argmax(-1), b.argmax(-1))
        assert [feat.dtype for feat in held["teachers"].feats] == [model.dtype for model in networks.teachers]
        outputs, _ = inputs.teacher_outputs(
            networks, variables, {"temperatures": np.ones(2, np.float32)}, None, {"teachers": held["teachers"]}
        )
        assert outputs.logits.dtype == np.float32


def test_a_bank_holds_what_it_has_read_until_it_forgets():
    bank = Bank(
        make()[0],
        SPLIT,
        feed := make_feed(),
        name="a split",
        key=lambda view: KEYS[view[1]],
        data_aug=1,
        place=feed.place,
    )
    teachers = bank.read("teachers", make()[1], [(0, 0), (0, 1)])
    (student,) = bank.read("student", make()[1], [(0, 1)])
    for number, outputs in enumerate(teachers):
        jax.tree.map(np.testing.assert_array_equal, bank.of("teachers", (0, number)).resident, {"teachers": outputs})
    jax.tree.map(np.testing.assert_array_equal, bank.of("student", (0, 1)).resident, {"student": student})
    assert bank.of("student", (0, 0)) is None
    bank.forget("student")
    assert bank.of("student", (0, 1)) is None is not bank.of("teachers", (0, 1))
    bank.read("teachers", make()[1], [(0, 1)])
    assert bank.of("teachers", (0, 0)) is None


def test_correct_counts():
    logits = np.eye(3)[np.array([[0, 0], [1, 2], [2, 2], [1, 1]])] * [[[1], [5]]]  # the second teacher is the surer one
    known, labels = np.ones((2, 3), bool), np.array([0, 2, 2, 0])
    expected = {"teacher1": 2, "teacher2": 3, "average": 3, "disagreement": 1}
    assert correct_counts(logits, known, labels, np.ones(2)) == expected
    cooler = correct_counts(logits, known, labels, np.array([1.0, 10.0]))  # now the first is the surer one
    assert cooler == expected | {"average": 2}


def test_correct_counts_of_teachers_of_some_classes():
    """They disagree about what both know. A logit that is not finite is wrong where the teacher knows the class, and
    differs from any prediction; elsewhere it is nothing."""
    known = np.array([[1, 1, 1, 0], [0, 1, 1, 1]], bool)
    first = [[3, 0, -9, 9], [0, 3, -9, 9], [0, 3, -9, 9], [np.inf, 0, -9, 9]]
    second = [[9, 0, -9, 2], [9, 0, 2, -9], [np.nan, 3, 0, -9], [9, 3, 0, -9]]
    logits = np.float32(np.stack([first, second], axis=1))
    counts = correct_counts(logits, known, np.array([0, 1, 1, 1]), np.ones(2))
    assert counts == {"teacher1": 3, "teacher2": 2, "average": 3, "disagreement": 2}
