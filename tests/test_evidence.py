"""The script of docs/results: its statistics, what it takes for a row's run, and that results.md has what was kept."""

import itertools
import pathlib
import shlex
import sys

import numpy as np
import pytest

from asib_jax import recipe as recipes
from asib_jax.recipe import checks

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "docs" / "results"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(FOLDER), *sys.path])
        import teachers

        yield teachers
    for name in ("teachers", "scenarios", "cifar16"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "values", [[0.5, 1.0, 3.0], [-2.0, 1.0, 1.5], [0.1, 0.4, 0.2, 0.9, 1.3, 0.6], [3, -1, 2, 0.5, -4, 1]]
)
def test_statistics_of_paired_differences(script, values):
    """The interval with the quantile of Student's t for 2 and 5 degrees of freedom; p by counting all signs."""
    quantile = {3: 4.302652729911275, 6: 2.5705818366147395}[len(values)]
    half = quantile * np.std(values, ddof=1) / np.sqrt(len(values))
    np.testing.assert_allclose(script.interval(values), [np.mean(values) - half, np.mean(values) + half])
    sums = [np.dot(signs, values) for signs in itertools.product([1, -1], repeat=len(values))]
    p, least = script.sign_flip(values)
    assert p == pytest.approx(np.mean(np.abs(sums) >= abs(sum(values)) - 1e-9))
    assert least == {3: 0.25, 6: 0.03125}[len(values)] and (p == least) == (min(values) > 0)


def row_of(command, **figures):
    """The row of summary.csv that a printed command leaves on some machine."""
    config, *keys = [part.removeprefix("--config.") for part in shlex.split(command)[2:]]
    values = dict(key.partition("=")[::2] for key in keys) | {"dataset.path": "/data/c.npz", "pictures": "False"}
    seed, name = values.pop("seed"), config.rpartition(":")[2]
    told = " ".join(f"{key}={value}" for key, value in sorted(values.items()))
    best = {"validation_acc_best": "0.3", "test_acc_best": "0.25", "test_acc_last": "0.25"}
    return {"name": f"cifar16_{name}_{seed}", "status": "finished", "seed": seed, "overrides": told} | best | figures


def test_runs_are_found_again_and_weights_are_chosen_on_validation(script):
    """Of a seed that counts, those of the chosen setting alone are run, shown and compared."""
    tried = script.commands([], ["9"])
    runs = [
        row_of(command, validation_acc_best="0.4" if "kd_alpha='0.9' --config.tau='10.0'" in command else "0.3")
        for command in tried
    ]
    kept = script.select(runs)
    assert {(run["scenario"], run["row"]) for run in kept} == {row[:2] for row in script.ROWS}
    assert {script.chosen(kept, *row[:2]) for row in script.ROWS} == {"", "0.1 0.9 10.0"}
    assert script.tables(kept).split() == []  # none of a seed that counts
    later = script.commands(kept, ["0", "1"])
    assert len(set(later)) == len(later) and all("kd_alpha='0.9'" in line for line in later if "ce_only" not in line)
    for command in later:
        score = 0.31 if "train_epochs='5'" in command else 0.25 if "seed='0'" in command else 0.26
        runs.append(row_of(command, test_acc_best=str(score)))
    runs += [
        {**runs[-1], "status": "failed"},
        {**runs[-1], "overrides": runs[-1]["overrides"] + " tau_decay_power=2.0"},
    ]
    text = script.tables(script.select(runs))
    assert "| labels alone | 2 | 25.50 ± 0.71 | 25.00 ± 0.00 |  |  |" in text
    assert "| 5 epochs | 2 | 31.00 ± 0.00 | 25.00 ± 0.00 | +5.50 [-0.85, +11.85] | 0.500 (0.500) |" in text
    assert text.count("\n| ") == len(script.ROWS) + len(script.SCENARIOS)


def test_the_document_has_what_was_kept(script):
    kept = script.rows_of(script.KEPT) if script.KEPT.exists() else []
    _, _, rest = script.DOCUMENT.read_text().partition(script.BEGIN)
    shown, end, _ = rest.partition(script.END)
    assert end and shown == (script.tables(kept) if kept else "")


def test_the_figure_is_drawn_of_what_was_kept(script, tmp_path):
    """The same bytes again; text stays text."""
    figures = {"validation_acc_best": "0.3", "test_acc_last": "0.3"}
    names = dict(zip(script.NAMES, (*script.ROWS[0][:2], "")))
    kept = [names | figures | {"seed": str(seed), "test_acc_best": str(0.3 + seed / 100)} for seed in range(3)]
    for name in ("a.svg", "b.svg"):
        script.draw(kept, tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert "labels alone (n = 3)" in text and "test images (%)" in text


def test_every_command_is_a_run_that_can_be(script):
    """Of the configuration that it names, with every key that it sets."""
    import cifar16

    for _, row, config, changes in script.ROWS:
        for keys in script.variants(config, changes).values():
            made = cifar16.get_config(config)
            made.update_from_flattened_dict({"dataset.path": "cifar100.npz", "dataset.name": "npz", **keys})
            recipe = recipes.read(made)
            checks.check(recipe)
            assert recipe.uses_teachers == (config != "ce_only"), row
