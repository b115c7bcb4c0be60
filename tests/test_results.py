"""The final table: what it counts, marks and calls things."""

import collections
import dataclasses
import re

import numpy as np
import pytest
from networks import make_feed, make_networks, make_split

from asib_jax import recipe
from asib_jax.engine.evaluate import Evaluator
from asib_jax.models.ensemble import Networks, Variables
from asib_jax.record import results
from asib_jax.record.finished import Finished
from asib_jax.record.results import Results
from configs import l1_ib

COUNTS = {
    "teacher1": 90,
    "teacher2": 80,
    "average": 92,
    "training_free": 93,
    "disagreement": 25,
    "synergy": 85,
    "without_teachers": 10,
    "last": 70,
    "best": 71,
    "control_last": 60,
    "control_best": 61,
}


def make(changes=(), training_free="avg") -> tuple[recipe.Recipe, Results]:
    config = l1_ib.get_config("digits")
    config.update_from_flattened_dict(dict(changes))
    validation = {name: count // 2 for name, count in COUNTS.items()}
    read = recipe.read(config)
    return read, Results(
        {"test": COUNTS, "validation": validation},
        {"test": 100, "validation": 50},
        {"avg (gate shut)": 0.25, "synergy": 0.75},
        results.moving_parameters(read),
        training_free=training_free,
    )


def rows(text: str) -> dict[str, str]:
    return {line.split("  ")[0]: line for line in text.split("\n\n")[0].splitlines()[2:]}


def test_rows_stand_in_order_with_their_counts():
    text = results.render(*make())
    table = rows(text)
    assert list(table) == [
        "teacher1 (resnet14)",
        "teacher2 (resnet8)",
        "teachers' average",
        "best training-free (avg)",
        "synergy ensemble",
        "synergy, teachers zeroed",
        "student alone, last",
        "student alone, best",
        "student, last",
        "student, best",
    ]
    assert text.startswith("100 test images, 50 validation images\nname ")
    assert table["synergy ensemble"].split()[-7:] == ["A-epoch", "85", "85.00", "76.72", "to", "90.69", "84.00"]
    assert "*" not in text
    assert "distilled from: avg (gate shut) 25.0 % of B-steps, synergy 75.0 % of B-steps" in text
    assert "teachers disagree on 25.00 % of test images" in text


@pytest.mark.parametrize("correct, count", [(0, 10), (10, 10), (50, 100), (731, 1000), (1, 3), (9_999, 10_000)])
def test_interval_inverts_the_score_test(correct, count):
    """Both ends p solve (share - p)^2 = z^2 p (1 - p) / count: of 50 in 100 they are 0.4038 and 0.5962."""
    read, _ = make()
    text = results.render(
        read, Results({"test": {"last": correct}, "validation": {"last": 1}}, {"test": count, "validation": 2}, {}, {})
    )
    share, z2 = correct / count, 1.959963984540054**2
    low, high = np.sort(np.roots([1 + z2 / count, -2 * share - z2 / count, share**2]))
    interval = [f"{100 * low:.2f}", "to", f"{100 * high:.2f}"]
    assert rows(text)["student, last"].split()[-6:] == [str(correct), f"{100 * share:.2f}", *interval, "50.00"]
    assert text.startswith(f"{count} test images, 2 validation images\n")


@pytest.mark.parametrize(
    "network, saw_val, marked",
    [
        ("teacher2", True, {"teacher2 (resnet8)", "teachers' average", "best training-free (avg)", "synergy ensemble"}),
        ("teacher2", False, set()),
        (
            "model.student",
            True,
            {
                "synergy ensemble",
                "synergy, teachers zeroed",
                "student alone, last",
                "student alone, best",
                "student, last",
                "student, best",
            },
        ),
        ("model.student", False, set()),
    ],
)
def test_validation_that_given_weights_have_seen_is_marked(network, saw_val, marked):
    text = results.render(*make({f"{network}.weights": "weights.npz", f"{network}.saw_val": saw_val}.items()))
    assert {name for name, line in rows(text).items() if line.endswith("*")} == marked
    assert ("inflated" in text) == bool(marked)


def test_a_table_fits_its_width_and_leaves_out_the_parameters_before_a_figure():
    whole, narrow = (results.render(*make(), width=width) for width in (100, 80))
    assert max(map(len, whole.splitlines())) <= 100 and max(map(len, narrow.splitlines())) <= 80
    assert "best on validation" in results.render(*make(training_free="weighted_conf"))  # the longest there is
    figures = {name: re.split("  +", line)[2:] for name, line in rows(whole).items()}
    assert {name: re.split("  +", line)[1:] for name, line in rows(narrow).items()} == figures


def test_skipped_steps_are_told_where_there_are_any():
    read, made = make()
    assert "skipped" not in results.render(read, made) and "skipped_steps" not in made.summary
    made = dataclasses.replace(made, skipped={"stage1/a": 3, "stage1/b": 0, "control/stage2/b": 1})
    text = results.render(read, made)
    assert "\nskipped steps, whose loss or gradient was not finite: 3 of stage1/a, 1 of control/stage2/b" in text
    assert made.summary["skipped_steps"] == 4


@pytest.mark.parametrize(
    "changes, parameters, column, marked",
    [
        ({"synergy_base": "avg"}, "the teachers'", "test_acc_base", False),
        ({"synergy_base": "mixture"}, "best student, best A-epoch", "test_acc_base_best", False),
        ({"synergy_base": "avg", "use_teacher_finetuning": True}, "as the A-Steps left", "test_acc_base_last", False),
        ({"synergy_base": "mixture", "model.student.weights": "a.npz"}, "best student", "test_acc_base_best", True),
        ({"synergy_base": "avg", "model.student.weights": "a.npz"}, "the teachers'", "test_acc_base", False),
    ],
)
def test_the_base_stands_below_synergy(changes, parameters, column, marked):
    """Validation flatters it where a student that saw it asks."""
    read, made = make(changes.items())
    made = dataclasses.replace(made, counts={split: {**row, "base": 40} for split, row in made.counts.items()})
    table = rows(results.render(read, made))
    title = f"base ({changes['synergy_base']})"
    assert list(table)[4:7] == ["synergy ensemble", title, "synergy, teachers zeroed"]
    assert re.split("  +", table[title])[1].startswith(parameters) and " 40   40.00 " in table[title]
    assert table[title].endswith("*") == marked and made.summary[column] == 0.4


def test_summary_holds_shares_of_each_split():
    summary = make()[1].summary
    assert summary["test_acc_best"] == 0.71 and summary["validation_acc_best"] == 35 / 50
    assert summary["test_disagreement"] == 0.25 and summary["test_count"] == 100
    assert summary["synergy_steps_share"] == 0.75 and "test_acc_disagreement" not in summary
    assert summary["validation_acc_synergy_best"] == 42 / 50 and "test_acc_synergy" not in summary
    assert summary["test_acc_teacher1"] == 0.9  # whose parameters stand still


@pytest.mark.parametrize(
    "changes, columns, parameters",
    [
        (
            {},
            {"test_acc_teacher2", "test_acc_average", "test_acc_synergy_best", "test_disagreement"},
            ["best epoch", "best epoch", "as above", "best on validation", *["best student, best A-epoch"] * 2],
        ),
        (
            {"restore_best": False},
            {"test_acc_synergy_last", "test_acc_without_teachers_last", "test_acc_last"},
            ["best epoch", "best epoch", "as above", "best on validation", *["last student, best A-epoch"] * 2],
        ),
        (
            {"use_teacher_finetuning": True, "teacher1.weights": "given.npz"},
            {
                "test_acc_teacher1_last",
                "test_acc_average_last",
                "test_acc_training_free_last",
                "test_disagreement_last",
            },
            ["as the A-Steps left them"] * 4 + ["best student, best A-epoch"] * 2,
        ),
        (
            {"teacher1.weights": "given.npz", "teacher1.finetune_epochs": 0},
            {"test_acc_teacher1"},
            ["as given", "best epoch", "as above", "best on validation", *["best student, best A-epoch"] * 2],
        ),
    ],
)
def test_every_accuracy_says_of_which_parameters(changes, columns, parameters):
    made = make(changes.items())
    assert columns <= made[1].summary.keys()
    shown = [re.split("  +", line)[1] for line in rows(results.render(*made)).values()]
    assert shown == parameters + ["last epoch", "best epoch"] * 2


def counted(name, logits, known_to=((), ())):
    """An evaluator of a split of labels 0, 1, 2, 3, 4, 0, ... whose teachers say logits [N, T, 5]."""
    nets = make_networks(classes=known_to)
    evaluator = Evaluator(Networks(nets.student, nets.teachers), make_split(len(logits)), make_feed(), name)
    evaluator.teacher_logits = np.float32(logits)
    evaluator.divide(np.ones(2))
    return evaluator


def said(*teachers, strength=(4.0, 1.0)):
    """Logits [N, 2, 5] of teachers that are right (1) or say the next class (0), one surer than the other."""
    labels = np.arange(len(teachers[0])) % 5
    return np.stack(
        [s * np.eye(5)[(labels + 1 - np.array(right)) % 5] for right, s in zip(teachers, strength, strict=True)], 1
    )


def test_what_needs_no_training_is_chosen_on_validation_and_measured_on_test():
    """Validation says the weaker teacher, which is wrong on test; of equal ones the average is first."""
    read, weak = make()[0], said([0, 0, 0, 1, 1], [1, 1, 1, 1, 1])
    test = said([1, 1, 1, 1, 1], [0, 0, 0, 0, 1])
    done = Finished(Variables({}, {}), {}, collections.Counter())
    for validation, best, right in ((weak, "teacher2", 1), (said([1] * 5, [0] * 5), "avg", 5)):
        evaluators = counted("validation", validation), counted("test", test)
        found = results.final_results(read, evaluators[0].bank.nets, done, *evaluators)
        assert (found.training_free, found.counts["test"]["training_free"]) == (best, right)
        assert f"best training-free ({best})" in results.render(read, found)
    alone = Networks(evaluators[0].bank.nets.student, evaluators[0].bank.nets.teachers[:1])
    assert "training_free" not in results.final_results(read, alone, done, *evaluators).counts["test"]


def test_training_free_targets_of_teachers_of_some_classes():
    """The surer one is asked by `max_conf`; each class has the mean of those who know it in `avg`."""
    logits = np.full((4, 2, 5), -9.0)
    logits[:, 0, :3], logits[:, 1, 2:] = [5, 0, 0], [0, 0, 2]  # labels 0 to 3: the first teacher says 0, the other 4
    counts = counted("test", logits, ((0, 1, 2), (2, 3, 4))).training_free(2.0)
    assert counts == {"avg": 1, "weighted_conf": 1, "max_conf": 1, "entropy": 1, "teacher1": 1, "teacher2": 0}


@pytest.mark.parametrize("count", [101, -1])
def test_a_count_that_its_split_cannot_have_is_an_error(count):
    _, good = make()
    with pytest.raises(ValueError, match=f"test: {count} synergy of 100"):
        dataclasses.replace(good, counts=good.counts | {"test": COUNTS | {"synergy": count}})
