"""Stored teacher outputs: what streaming would give, and a cache that is only hit by the same question."""
import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from asib_jax import feature_bank, parallel, state, steps, streams
from asib_jax.data.augment import augment
from asib_jax.models.ensemble import run_teachers
from asib_jax.steps import ATerms, BTerms
from networks import SHALLOW, make_networks, make_split, random_variables

SPLIT = make_split(21)
KEYS = [streams.key(0, "augment", 0, view) for view in range(2)]
A_TERMS = ATerms(synergy_ce_alpha=0.6, synergy_kd_alpha=1.0, kd_alpha=0.0, cccp_alpha=0.0, cccp_tau=4.0,
                 feat_kd_alpha=0.0, reg_lambda=0.0, ib_mbm_reg_lambda=0.0, label_smoothing=0.0, min_cw=0.1, data_aug=1)
B_TERMS = BTerms(data_aug=1, ce_alpha=0.65, kd_alpha=0.35, kd_target="synergy", kd_max_ratio=2.0)
pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def make():
    nets = make_networks(**SHALLOW)
    return nets, random_variables(nets)


def build(split=SPLIT, *, variables=None, nets=None, devices=1, keys=KEYS, data_aug=1, cache=""):
    return feature_bank.build(nets or make()[0], variables or make()[1], split, keys=keys, data_aug=data_aug,
                              batch_size=8, devices=parallel.local_devices(devices), cache=str(cache))


@functools.cache
def stored():
    return build()


def assert_close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), actual, expected)


def test_outputs_are_those_of_the_teachers_on_each_view():
    """Rows, not data-set indices, address the bank; views differ; every image of an incomplete batch is there. 1e-5."""
    nets, variables = make()
    rows = np.array([20, 3, 3, 11])
    bank = stored()
    streamed = jax.jit(lambda variables, key, batch: run_teachers(
        nets, variables, augment(key, batch.index, batch.image, 1)))
    assert bank.logits.shape == (2, 21, 2, 5) and [feat.shape for feat in bank.feats] == [(2, 21, 3), (2, 21, 4)]
    for view, key in enumerate(KEYS):
        wanted, _ = streamed(variables, key, SPLIT.take(rows))
        assert_close(bank.outputs(view, rows), wanted)
    assert np.abs(bank.logits[0] - bank.logits[1]).max() > 0.1


def test_bank_is_the_same_on_four_devices():
    assert_close(build(devices=4), stored())


@pytest.mark.parametrize("kind", ["a", "b"])
def test_a_step_from_the_bank_is_the_plain_step(kind):
    """One update by SGD gives the same parameters, to 1e-5, as running the teachers on that view of the images."""
    nets, variables = make()
    names = ("ib_mbm", "synergy_head") if kind == "a" else ("student",)
    loss = (functools.partial(steps.a_loss, nets=nets, terms=A_TERMS, trained=None) if kind == "a" else
            functools.partial(steps.b_loss, nets=nets, terms=B_TERMS))
    tx = state.make_optimizer("sgd", weight_decay=0.0, grad_clip_norm=0.0)
    step = jax.jit(steps.make_train_step(loss, tx))
    values = {"tau": 3.0, "beta": 1e-3, "open": 1.0, "certain": 1.0, "gate": 1.0, "average_share": 0.0, "ramp": 1.0,
              "ratio_on": 1.0, "lr": 0.1}
    controls = {**jax.tree.map(np.float32, values), "step": np.int32(0), "augment_key": KEYS[1],
                "noise_key": streams.key(0, "noise"), "dropout_key": streams.key(0, "dropout"),
                "mix_key": streams.key(0, "mix")}
    rows = np.arange(1, 17, 2)
    plain = SPLIT.take(rows)._asdict()

    def after(batch):
        current, frozen = state.begin(variables, {name: name in names for name in variables.params}, (), tx)
        return step(current, frozen, controls, batch)[0].params

    expected, other_view = after(plain), after(plain | {"teachers": stored().outputs(0, rows)})
    actual = after(plain | {"teachers": stored().outputs(1, rows)})
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
    """The stored file is marked; whoever gets the mark was answered from it."""
    nets, variables = make()
    first = build(cache=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, first, stored())
    (file,) = tmp_path.iterdir()
    with np.load(file) as arrays:
        np.savez(file, **{**arrays, "logits": np.full_like(arrays["logits"], 7)})

    def answered(**options):
        return bool((build(**{"cache": tmp_path} | options).logits == 7).all())

    assert answered()
    assert answered(devices=4)
    assert answered(variables=changed(variables, "params", "teacher1", "distill_adapter", "fc1", "bias"))
    assert answered(variables=changed(variables, "params", "student", "classifier", "bias"))
    wider = replace(nets, teachers=(nets.teachers[0].clone(mean=(0.6,)), nets.teachers[1]))
    for question in ({"variables": changed(variables, "params", "teacher2", "stage0", "conv", "kernel")},
                     {"variables": changed(variables, "batch_stats", "teacher1", "stage0", "bn", "var")},
                     {"split": other_image()}, {"split": SPLIT._replace(index=SPLIT.index + 1)}, {"keys": KEYS[::-1]},
                     {"keys": KEYS[:1]}, {"data_aug": 3}, {"nets": wider}):
        assert not answered(**question)
    assert len(list(tmp_path.iterdir())) == 9


def test_correct_counts():
    logits = np.eye(3)[np.array([[0, 0], [1, 2], [2, 2], [1, 1]])] * [[[1], [5]]]  # the second teacher is the surer one
    bank = feature_bank.Bank((), logits[None])
    counts = feature_bank.correct_counts(bank, np.array([0, 2, 2, 0]))
    assert counts == {"teacher1": 2, "teacher2": 3, "average": 3, "disagreement": 1}
