"""A run's pictures by what they show: points, cells, bars and pixels against the numbers they are of."""

import ast
import logging
import pathlib

import matplotlib
import numpy as np
import pytest
from networks import make_split

from asib_jax.data.parts import Data
from asib_jax.data.sources import Split
from asib_jax.record import curves, drawings, predictions
from asib_jax.tools import predict

ROOT = pathlib.Path(__file__).resolve().parents[1]
NAMES = ("zero", "one", "two")
LOGITS = np.log(
    [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1], [0.05, 0.05, 0.9], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]]
)
LABELS = np.array([0, 0, 1, 2, 2, 1], np.int32)


def metrics(gate=(0.0, 1.0, 1.0)):
    """Of a teacher of two epochs, two stages of one A-epoch and B-epochs (2, 1), and a control."""
    found = {
        f"teacher1/epoch{k:02d}/{name}": v + k for k in (1, 2) for name, v in {"loss": 2, "val_teacher1": 0}.items()
    }
    for stage, epochs in ((1, (0, 1)), (2, (2,))):
        found |= {f"stage{stage}/a/epoch01/loss": 5.0 - stage, f"stage{stage}/a/epoch01/val_synergy": 0.3 * stage}
        for k in epochs:
            key = f"stage{stage}/b/epoch{k - epochs[0] + 1:02d}"
            found |= {f"{key}/loss": 1.5 - k / 4, f"{key}/ce": 1.25 - k / 4, f"{key}/gate": gate[k]}
            found |= {f"{key}/val_student": 0.25 * (k + 1), f"{key}/val_synergy": 0.3 * stage}
            found |= {f"control/{key}/loss": None if k == 1 else 3.0 - k, f"control/{key}/val_control": 0.125 * (k + 1)}
            found[f"time/{key}/seconds"] = 1.0
    return found | {"final/test_acc_best": 0.5, "stage1/a/before/val_synergy": 0.1}


def lines(axis):
    """By label, the points that are not NaN."""
    return {
        line.get_label(): [(x, y) for x, y in zip(*map(np.asarray, line.get_data())) if np.isfinite(y)]
        for line in axis.get_lines()
    }


def test_curves_show_every_epoch_of_the_metrics_and_where_the_gate_opens():
    figure = drawings.draw_curves(metrics())
    losses, accuracies = figure.axes[:3], figure.axes[3:]
    assert [axis.get_title() for axis in losses] == ["teacher1", "A-Step: fusion network", "B-Step: student"]
    assert lines(losses[0]) == {"teacher1": [(1, 3), (2, 4)]}
    assert lines(losses[1]) == {"A-Step": [(1, 4), (2, 3)]}
    assert lines(losses[2]) == {
        "student": [(1, 1.5), (2, 1.25), (3, 1.0)],
        "student, from labels": [(1, 1.25), (2, 1.0), (3, 0.75)],
        "student alone": [(1, 3.0), (3, 1.0)],  # one was not finite
    }
    shown = lines(accuracies[2])
    assert shown["student"] == [(1, 25), (2, 50), (3, 75)] and shown["synergy ensemble"] == [(1, 30), (2, 30), (3, 60)]
    assert shown["student alone"] == [(1, 12.5), (2, 25), (3, 37.5)]
    assert [x for x, _ in shown["the gate to synergy opens"]] == [2, 2]
    (shaded,) = accuracies[2].patches  # the second stage
    assert (shaded.get_x(), shaded.get_width()) == (2.5, 1.0)
    assert "the gate to synergy stays shut" in lines(drawings.draw_curves(metrics((0, 0, 0))).axes[5])


def test_a_curve_is_broken_between_stages():
    phases = [phase for phase in curves.read(metrics()) if phase.curve == "b"]
    x, y = curves.points(phases, "val_student")
    np.testing.assert_array_equal(x, [1, 2, 2.5, 3])
    np.testing.assert_array_equal(y, [0.25, 0.5, np.nan, 0.75])


def test_a_run_without_a_phase_has_a_picture_that_says_so(tmp_path):
    assert drawings.draw_curves({"final/test_acc": 1.0}).get_suptitle() == "nothing was trained"


def test_confusions_ranks_and_mistakes_are_counted_one_by_one():
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 30, 400).astype(np.int32), rng.normal(size=(400, 30)).astype(np.float32)
    logits[5:50, 7] = logits[5:50, 3]  # ties
    logits[200:210], logits[7, 3], logits[8] = 0.0, np.nan, np.inf
    guesses = predictions.probabilities(logits)
    cells, top, sure = np.zeros((30, 30), int), [], {}
    for row, (label, logit) in enumerate(zip(labels, logits)):
        order = sorted(range(30), key=lambda k: (-logit[k], k))
        whole = np.isfinite(logit).all()
        top.append(whole and label in order[:5])
        if whole:
            cells[label, order[0]] += 1
            powers = np.exp(logit.astype(np.float64))
            np.testing.assert_allclose(guesses[row], powers / powers.sum(), rtol=1e-12)
            if order[0] != label:
                sure[row] = powers.max() / powers.sum()
    assert np.isnan(guesses[[7, 8]]).all()
    np.testing.assert_array_equal(predictions.confusion(labels, guesses), cells)
    np.testing.assert_array_equal(predictions.top_correct(labels, guesses), top)
    worst = predictions.worst_mistakes(labels, guesses, 20)
    np.testing.assert_allclose([sure[row] for row in worst], sorted(sure.values(), reverse=True)[:20], rtol=1e-12)


def test_the_matrix_shows_every_count_at_its_place():
    cells = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]])
    np.testing.assert_array_equal(predictions.confusion(LABELS, predictions.probabilities(LOGITS)), cells)
    figure = drawings.draw_confusion(cells, NAMES)
    axis = figure.axes[0]
    assert {(text.get_position(), text.get_text()) for text in axis.texts} == {
        ((int(x), int(y)), "1") for y, x in np.argwhere(cells)
    }
    np.testing.assert_allclose(axis.images[0].get_array(), cells / 2)
    assert [tick.get_text() for tick in axis.get_yticklabels()] == [*NAMES]
    assert figure.get_suptitle() == "best student on test: 2 of 6 right, 33.33 %"


def test_the_matrix_of_many_classes_is_beside_its_most_frequent_mistakes():
    cells = 9 * np.eye(100, dtype=int)
    cells[3, 50], cells[99, 0], cells[7, 8] = 4, 6, 1
    figure = drawings.draw_confusion(cells, [f"class {k}" for k in range(100)])
    (told,) = figure.axes[1].texts
    assert told.get_text().splitlines()[1:] == [
        "6  class 99 → class 0",
        "4  class 3 → class 50",
        "1  class 7 → class 8",
    ]
    assert len(figure.axes[0].get_yticklabels()) == 100 and not figure.axes[0].texts


def test_bars_are_the_accuracies_of_the_classes_sorted():
    guesses = predictions.probabilities(np.vstack([LOGITS, LOGITS[3:4]]))
    axis = drawings.draw_classes(np.append(LABELS, 2), guesses, NAMES).axes[0]
    np.testing.assert_allclose([bar.get_height() for bar in axis.patches], [0, 50, 200 / 3])
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["one  0/2", "zero  1/2", "two  2/3"]
    assert axis.get_legend_handles_labels()[1] == ["accuracy; of all 42.86 %"]


def test_from_twenty_classes_on_top_5_is_beside_them():
    labels, rng = np.arange(25) % 24, np.random.default_rng(0)  # one of the 25 classes has no image
    guesses = predictions.probabilities(rng.normal(size=(25, 25)) + 3 * np.eye(25)[labels])
    axis = drawings.draw_classes(labels, guesses, [str(k) for k in range(25)]).axes[0]
    right = predictions.top_correct(labels, guesses)
    (top,) = (line for line in axis.get_lines() if line.get_label().startswith("top-5"))
    assert len(axis.patches) == len(top.get_ydata()) == 24
    assert sorted(top.get_ydata()) == sorted(100 * right[labels == k].mean() for k in range(24))
    assert f"{100 * right.mean():.2f} %" in top.get_label()


def test_mistakes_are_shown_with_their_images_the_surest_first():
    images = make_split(6).image
    axes = drawings.draw_mistakes(images, LABELS, predictions.probabilities(LOGITS), NAMES).axes
    shown = [axis.get_title() for axis in axes if axis.get_title()]
    assert shown == ["zero\n→ one  80.0 %", "one\n→ zero  60.0 %", "two\n→ one  50.0 %", "one\n→ two  40.0 %"]
    for axis, row in zip(axes, (1, 2, 4, 5)):
        np.testing.assert_array_equal(axis.images[0].get_array(), images[row])
    none = drawings.draw_mistakes(images[:1], LABELS[:1], predictions.probabilities(LOGITS[:1]), NAMES)
    assert none.get_suptitle() == "the best student made no mistake on test"


def data(names=NAMES, channels=3):
    split = Split(make_split(6).image[..., :channels], LABELS, np.arange(6, dtype=np.int32))
    return Data(split, split, split, split, names, "colours")


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_pictures_are_written_and_nothing_global_is_changed(tmp_path, channels):
    before, modules = dict(matplotlib.rcParams), set(__import__("sys").modules)
    drawings.draw(tmp_path, metrics(), data(("$x_", "a" * 60 + "\n", "%"), channels), LOGITS.astype(np.float32))
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        f"{name}.png" for name in ("curves", "confusion", "classes", "mistakes")
    }
    assert dict(matplotlib.rcParams) == before and "matplotlib.pyplot" not in set(__import__("sys").modules) - modules


def test_what_cannot_be_drawn_is_a_warning_with_its_reason(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("asib_jax"), "propagate", True)
    drawings.draw(tmp_path, {"b/epoch01/loss": "text"}, data(), LOGITS)
    assert {path.stem for path in (tmp_path / "pictures").iterdir()} == {"confusion", "classes", "mistakes"}
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "picture curves could not be drawn: ValueError" in warning.message
    (tmp_path / "file").write_text("")
    caplog.clear()
    drawings.draw(tmp_path / "file", metrics(), data(), None)
    assert "picture curves could not be drawn: NotADirectoryError" in caplog.text


@pytest.mark.parametrize(
    "name, shown",
    [
        ("two\nlines", r"two\nlines"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\u202edesrever", r"\u202edesrever"),  # which would turn the figures after it, too
        ("a\u2028b\tc", r"a\u2028b\tc"),
        ("$x_1$ 😀 שלום", "$x_1$ 😀 שלום"),
    ],
)
def test_a_name_is_one_line_of_what_it_is(name, shown):
    names, guesses = (name, "one", "two"), predictions.probabilities(LOGITS)
    (title,) = [
        axis.get_title()
        for axis in drawings.draw_mistakes(make_split(6).image, LABELS, guesses, names).axes
        if axis.get_title().startswith("one\n")
    ][:1]
    assert title == f"one\n→ {shown}  60.0 %"
    matrix = drawings.draw_confusion(predictions.confusion(LABELS, guesses), names).axes[0]
    assert matrix.get_yticklabels()[0].get_text() == shown
    files = [pathlib.Path(f"{name}.png")]
    table = predict.text(predict.Predictions(files, names, guesses[:1]), 1).splitlines()
    assert table[1:] == [f"{shown}.png  {shown}  70.00"]


def test_letters_that_the_font_has_not_are_told_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("asib_jax"), "propagate", True)
    drawings.draw(tmp_path, metrics(), data(("狗", "猫", "鸟")), LOGITS)
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 3 and all("Glyph" in message for message in told)


def test_matplotlib_is_imported_only_where_something_is_drawn():
    for path in (ROOT / "asib_jax").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            assert not any(name.startswith("matplotlib") for name in [module, *names]), path


def test_who_knows_what_has_a_bar_a_class_and_shades_what_teachers_know():
    named = {"teacher1": np.array([0, 0, 1, 1, 0, 1]), "average": LABELS, "student": np.zeros(6, int)}
    figure = drawings.draw_specialists(LABELS, named, np.array([[True, True, False]]), NAMES)
    bars = [[bar.get_height() for bar in group] for group in figure.axes[0].containers]
    assert bars == [[100, 100, 0], [100, 100, 100], [100, 0, 0]]
    assert [text.get_text().split(";")[1] for text in figure.axes[0].get_legend().get_texts()] == [
        " of its classes 100.00 %",
        " of all 100.00 %",
        " of all 33.33 %",
    ]
    shaded = [patch for patch in figure.axes[0].patches if patch.get_alpha()]
    assert [(patch.get_x(), patch.get_width()) for patch in shaded] == [(-0.5, 1.0), (0.5, 1.0)]
