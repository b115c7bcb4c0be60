"""Correct predictions counted by hand, from networks applied one by one to the whole split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import DIM, SHALLOW, make_feed, make_networks, make_split, random_variables

from asib_jax.data.splits import evaluation_rows
from asib_jax.engine.evaluate import Evaluator
from asib_jax.models.ensemble import Networks, Variables

SPLIT = make_split(21)  # batches of 8 leave three empty places
pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def make():
    nets = make_networks(**SHALLOW)
    return nets, random_variables(nets)


@functools.cache
def evaluator(count):
    return fresh(count)


def fresh(count, batch=8):
    """An evaluator that has read the teachers."""
    nets, variables = make()
    made = Evaluator(nets, SPLIT, make_feed(count, eval_batch=batch), "test")
    made.read_teachers(variables)
    return made


@jax.jit
def predictions_by_hand(variables):
    nets, _ = make()
    pixels = jnp.float32(SPLIT.image)
    student = nets.student.apply(variables.of("student"), pixels, train=False)
    teachers = [
        model.apply(variables.of(name), pixels, train=False) for name, model in zip(nets.teacher_names, nets.teachers)
    ]
    read = jnp.stack([teacher.distill_feat for teacher in teachers], axis=1)

    def synergy(kv):
        mu = nets.ib_mbm.apply({"params": variables.params["ib_mbm"]}, student.distill_feat, kv).mu
        return nets.synergy_head.apply({"params": variables.params["synergy_head"]}, mu)

    logits = {
        "student": student.logit,
        "teacher1": teachers[0].logit,
        "teacher2": teachers[1].logit,
        "average": (teachers[0].logit + teachers[1].logit) / 2,
        "synergy": synergy(read),
        "without_teachers": synergy(jnp.zeros_like(read)),
    }
    return {name: jnp.argmax(value, axis=-1) for name, value in logits.items()}


@pytest.fixture(scope="module")
def by_hand():
    predictions = jax.device_get(predictions_by_hand(make()[1]))
    counts = {name: int((value == SPLIT.label).sum()) for name, value in predictions.items()}
    return counts | {"disagreement": int((predictions["teacher1"] != predictions["teacher2"]).sum())}


@pytest.mark.parametrize("count", [1, 4])
def test_every_example_counts_once_on_any_number_of_devices(count, by_hand):
    """Twice the same: the synergy code is mu, without noise (SPEC 10.6)."""
    for _ in range(2):
        counts = evaluator(count)(*make())
        assert counts == {name: by_hand[name] for name in ("student", "synergy", "without_teachers", "average")}
    assert evaluator(count).teacher_counts == {
        name: by_hand[name] for name in ("teacher1", "teacher2", "average", "disagreement")
    }
    assert len({by_hand[name] for name in ("student", "synergy", "without_teachers")}) == 3  # none stands for another


@pytest.mark.parametrize("base", ["avg", "mixture"])
def test_synergy_on_a_base_of_teachers_that_know_some_classes(base):
    """Read by their probabilities, too; zeroed they are gone from keys and base. The base counts on its own."""
    nets = make_networks(**SHALLOW, base=base, joins=True, classes=((0, 1, 2, 3), (4, 3, 2)))
    variables = random_variables(nets)

    @jax.jit
    def predictions(variables):
        pixels, p, read = jnp.float32(SPLIT.image), [], []
        for name, model in zip(nets.teacher_names, nets.teachers):
            teacher = model.apply(variables.of(name), pixels, train=False)
            own = jax.nn.softmax(teacher.logit[:, np.array(model.classes)])
            p.append(jnp.zeros((len(own), 5)).at[:, np.array(model.classes)].set(own))
            x = jnp.concatenate([teacher.feat_2d, p[-1]], axis=1)
            for layer, activation in (("fc1", jax.nn.relu), ("fc2", lambda x: x)):
                weights = variables.params[name]["distill_adapter"][layer]
                x = activation(x @ weights["kernel"] + weights["bias"])
            read.append(x)
        student = nets.student.apply(variables.of("student"), pixels, train=False)
        head, out = variables.params["synergy_head"], {"student": student.logit}
        for name, kv in (("synergy", jnp.stack(read, 1)), ("without_teachers", jnp.zeros((len(pixels), 2, DIM)))):
            mu = nets.ib_mbm.apply({"params": variables.params["ib_mbm"]}, student.distill_feat, kv).mu
            hidden = jax.nn.relu(mu @ head["fc1"]["kernel"] + head["fc1"]["bias"])
            out[name] = hidden @ head["fc2"]["kernel"] + head["fc2"]["bias"]
            if name == "synergy":
                if base == "mixture":
                    pi = jax.nn.softmax(mu @ head["router"]["kernel"] + head["router"]["bias"])
                    out["base"] = jnp.log(pi[:, :1] * p[0] + pi[:, 1:] * p[1])
                else:
                    both = (jnp.log(p[0]) + jnp.log(p[1])) / 2
                    out["base"] = jnp.stack([*jnp.log(p[0][:, :2]).T, *both[:, 2:4].T, jnp.log(p[1][:, 4])], axis=1)
                out[name] += out["base"]
        return {name: jnp.argmax(value, axis=-1) for name, value in out.items()}

    expected = {name: int((value == SPLIT.label).sum()) for name, value in predictions(variables).items()}
    for count in (1, 4):
        made = Evaluator(nets, SPLIT, make_feed(count, eval_batch=8), "test")
        made.read_teachers(variables)
        counts = made(nets, variables)
        counts.pop("average")
        assert counts == expected
    assert len(set(expected.values())) > 2


@pytest.mark.parametrize("count", [1, 4])
def test_stored_student_counts_as_the_one_that_is_run(count, by_hand):
    """Until it is forgotten: then the student of the variables counts. A control is never the stored student."""
    nets, variables = make()
    own = fresh(count)
    own.bank.read("student", variables)
    other = jax.tree.map(lambda leaf: leaf, variables)
    other.params["student"]["classifier"] = jax.tree.map(jnp.negative, variables.params["student"]["classifier"])
    expected = {name: by_hand[name] for name in ("student", "synergy", "without_teachers", "average")}
    assert own(nets, variables) == own(nets, other) == expected
    control = Variables(*({"control": part["student"]} for part in other))
    apart = own(Networks(nets.student), control, "control")
    own.bank.forget("student")
    assert own(nets, variables) == expected != own(nets, other)
    assert apart == {"control": own(nets, other)["student"]}


def test_batch_larger_than_the_split(by_hand):
    """Three of four devices have nothing but padding."""
    large = fresh(4, batch=128)
    assert large(*make())["synergy"] == by_hand["synergy"]
    assert large.teacher_counts["disagreement"] == by_hand["disagreement"]


@pytest.mark.parametrize(
    "rows, counted",
    [
        (lambda rows: rows[:-1], 16),
        (lambda rows: np.concatenate([rows, rows[:1]]), 29),
        (lambda rows: np.where(rows == 3, 4, rows), 21),
        (lambda rows: np.where(rows == 0, 21, rows), 20),
    ],
)
@pytest.mark.parametrize("count", [1, 4])
def test_an_example_left_out_or_counted_twice_is_an_error(monkeypatch, count, rows, counted):
    monkeypatch.setattr("asib_jax.engine.evaluate.evaluation_rows", lambda *sizes: rows(evaluation_rows(*sizes)))
    own = fresh(count)
    with pytest.raises(ValueError, match=f"{counted} examples of the test split were counted, not all of its 21"):
        own(*make())


def test_accuracies_are_shares_of_the_split(by_hand):
    accuracies = evaluator(1).accuracies(*make())
    assert accuracies["synergy"] == by_hand["synergy"] / 21 and evaluator(1).count == 21


def test_student_alone_needs_neither_adapter_nor_teachers(by_hand):
    nets, variables = make()
    student = variables.of("student")
    params = {name: leaves for name, leaves in student["params"].items() if name != "distill_adapter"}
    alone, own = (
        Networks(nets.student.clone(adapter_dim=0)),
        Variables({"student": params}, {"student": student["batch_stats"]}),
    )
    without = Evaluator(alone, SPLIT, make_feed(eval_batch=8), "test")
    without.read_teachers(own)  # of none
    assert without.teacher_counts == {}
    assert without(alone, own) == evaluator(1)(alone, own) == {"student": by_hand["student"]}


def test_changed_teachers_are_read_again(by_hand):
    """Stored outputs stand for the teachers until they are told to be read; then the new ones count."""
    nets, variables = make()
    shifted = jax.tree.map(lambda leaf: leaf, variables)
    shifted.params["teacher1"]["classifier"] = jax.tree.map(jnp.negative, variables.params["teacher1"]["classifier"])
    own = fresh(1)
    assert own(nets, shifted)["average"] == by_hand["average"]
    own.read_teachers(shifted)
    logits = -nets.teachers[0].apply(variables.of("teacher1"), jnp.float32(SPLIT.image), train=False).logit
    assert own.teacher_counts["teacher1"] == int((np.argmax(logits, -1) == SPLIT.label).sum()) != by_hand["teacher1"]
    assert own.teacher_counts["teacher2"] == by_hand["teacher2"]
    assert own(nets, shifted)["average"] == own.teacher_counts["average"] != by_hand["average"]
