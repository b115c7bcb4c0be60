"""The runs of results.md's section on teachers: their commands, what is kept of them, its tables and its figure.

    python docs/results/teachers.py --print 9                    # the commands of seeds; of 9 with all settings
    python docs/results/teachers.py --read results/summary.csv   # into teachers.csv
    python docs/results/teachers.py                              # from there into results.md and teachers.svg

Runs are those of scenarios.py. Each row's weights of the losses are chosen on seed 9, by validation alone; all other
seeds count, the same ones in every row.
"""

import argparse
import ast
import csv
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scenarios import CHOICE, LABELS, SCENARIOS, SETTINGS
from scipy import stats

FOLDER = pathlib.Path(__file__).resolve().parent
KEPT, DOCUMENT, FIGURE = FOLDER / "teachers.csv", FOLDER.parent / "results.md", FOLDER / "teachers.svg"
BEGIN, END = "<!-- by docs/results/teachers.py -->\n", "<!-- to here -->\n"

ROWS = [(scenario, *row) for scenario, rows in SCENARIOS.items() for row in rows]
NAMES = ["scenario", "row", "setting", "seed"]
FIGURES = "validation_acc_best test_acc_best test_acc_last test_acc_average test_acc_synergy_best".split()
FIGURES += [f"{split}_acc_teacher{k}" for k in (1, 2) for split in ("train", "test")] + ["minutes", "revision"]
BLUE, RED = "#0072B2", "#D55E00"  # of Okabe and Ito (2008): told apart by every colour vision
OF_A_MACHINE = {"dataset.path", "teacher_cache", "pictures", "tensorboard", "compilation_cache", "num_devices"}

Run = dict[str, str]


def variants(config: str, changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By setting, what is overridden; without teachers there is nothing to set."""
    if config == "ce_only":
        return {"": changes}
    keys = ("ce_alpha", "kd_alpha", "tau")
    return {" ".join(map(str, own)): changes | dict(zip(keys, own)) | {"tau_schedule": ()} for own in SETTINGS}


def chosen(kept: list[Run], scenario: str, row: str) -> str | None:
    """The setting of a row that is best on validation, with the seed for that if it was run; None: nothing was."""
    own = [run for run in kept if (run["scenario"], run["row"]) == (scenario, row)]
    tried = [run for run in own if run["seed"] == CHOICE] or own
    best = max(tried, key=lambda run: float(run["validation_acc_best"]), default=None)
    return "" if row == LABELS else best and best["setting"]


def commands(kept: list[Run], seeds: list[str]) -> list[str]:
    """Of a run that several scenarios share one."""
    lines = []
    for seed in seeds:
        for scenario, row, config, changes in ROWS:
            for setting, keys in variants(config, changes).items():
                if seed == CHOICE or setting == chosen(kept, scenario, row):
                    told = " ".join(f"--config.{name}='{value}'" for name, value in (keys | {"seed": seed}).items())
                    lines.append(f"python launch/main.py --config=docs/results/cifar16.py:{config} {told}")
    return [*dict.fromkeys(lines)]


def select(runs: list[Run]) -> list[Run]:
    """What is kept of the finished ones of these rows of summary.csv: of two alike the later one."""
    found = {}
    for run in runs:
        own = dict(part.partition("=")[::2] for part in run["overrides"].split())
        own = {name: _value(text) for name, text in own.items() if name not in OF_A_MACHINE}
        for scenario, row, config, changes in ROWS if run["status"] == "finished" else []:
            for setting, keys in variants(config, changes).items():
                if (run["name"], own) == (f"cifar16_{config}_{run['seed']}", keys):
                    place = (scenario, row, setting, run["seed"])
                    found[place] = dict(zip(NAMES, place)) | {name: run.get(name) or "" for name in FIGURES}
    return [*found.values()]


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean, by Student's t."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return np.mean(values) - half, np.mean(values) + half


def sign_flip(differences: Sequence[float]) -> tuple[float, float]:
    """The exact two-sided p of paired differences, of all 2^n signs, and the least that so many can have."""
    test = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf)
    return test.pvalue, 2.0 ** (1 - len(differences))


def figure_of(kept: list[Run], scenario: str, row: str, name: str) -> dict[str, float]:
    """A figure in % by seed, of those that count and the row's chosen setting."""
    place = (scenario, row, chosen(kept, scenario, row))
    own = [run for run in kept if (run["scenario"], run["row"], run["setting"]) == place and run["seed"] != CHOICE]
    return {run["seed"]: 100 * float(run[name]) for run in own if run[name]}


def tables(kept: list[Run]) -> str:
    """Markdown: those rows of which something was run, in scenarios whose first row was."""
    head = "| row | n | student, best | student, last | difference | p (least) | teachers | synergy | taught |"
    lines = []
    for scenario, rows in SCENARIOS.items():
        shown = [line for row, *_ in rows if (line := _line(kept, scenario, row, rows[0][0]))]
        lines += [f"**{scenario}**", "", head, "|" + "---|" * 9, *shown, ""] if _begun(kept, scenario) else []
    return "\n".join(["", *lines, ""])


def _begun(kept: list[Run], scenario: str) -> bool:
    """Whether there is what its rows are compared with."""
    return bool(figure_of(kept, scenario, SCENARIOS[scenario][0][0], "test_acc_best"))


def _line(kept: list[Run], scenario: str, row: str, baseline: str) -> str:
    best, base = (figure_of(kept, scenario, name, "test_acc_best") for name in (row, baseline))
    differences = [best[seed] - base[seed] for seed in best if seed in base]
    change = p = ""
    if row != baseline and len(differences) > 1:
        change = "{:+.2f} [{:+.2f}, {:+.2f}]".format(np.mean(differences), *interval(differences))
        p = "{:.3f} ({:.3f})".format(*sign_flip(differences))
    own = {name: [*figure_of(kept, scenario, row, name).values()] for name in FIGURES if "acc" in name}
    means = {name: f"{np.mean(values):.1f}" if values else "" for name, values in own.items()}
    students = [own[name] for name in ("test_acc_best", "test_acc_last") if own[name]]
    student = [f"{np.mean(values):.2f} ± {np.std(values, ddof=len(values) > 1):.2f}" for values in students]
    taught = ", ".join(filter(None, (means["train_acc_teacher1"], means["train_acc_teacher2"])))
    together = means["test_acc_average"] if means["test_acc_teacher2"] else means["test_acc_teacher1"]
    cells = [row, str(len(best)), *student, change, p, together, means["test_acc_synergy_best"], taught]
    return f"| {' | '.join(cells)} |" if best else ""


def draw(kept: list[Run], path: pathlib.Path) -> None:
    """A panel for each scenario: a dot for each seed, the mean and its interval."""
    panels: dict[str, dict[str, list[float]]] = {}
    for scenario, row, *_ in (row for row in ROWS if _begun(kept, row[0])):
        if values := figure_of(kept, scenario, row, "test_acc_best"):
            panels.setdefault(scenario, {})[row] = [*values.values()]
    heights = [len(rows) + 1.2 for rows in panels.values()]
    with matplotlib.rc_context({"svg.hashsalt": "teachers", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure((7.5, 0.27 * sum(heights) + 0.8), layout="constrained")
        all_axes = figure.subplots(len(panels), height_ratios=heights, sharex=True, squeeze=False)[:, 0]
        for axes, (scenario, rows) in zip(all_axes, panels.items()):
            for place, own in enumerate(rows.values()):
                axes.plot(own, [place] * len(own), "o", color=BLUE, alpha=0.5, ms=4, mew=0, zorder=3)
                half = np.mean(own) - interval(own)[0] if len(own) > 1 else 0
                axes.errorbar(np.mean(own), place, xerr=half, fmt="|", color=RED, capsize=2.5, ms=9, lw=1)
            axes.set_yticks(range(len(rows)), [f"{row} (n = {len(own)})" for row, own in rows.items()])
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.set_title(scenario, loc="left")
            axes.grid(axis="x", alpha=0.3)
        all_axes[-1].set_xlabel("accuracy of the student, best on validation, on 10,000 test images (%)")
        figure.savefig(path, format="svg", metadata={"Date": None})


def rows_of(*paths: str | pathlib.Path) -> list[Run]:
    return [run for path in paths for run in csv.DictReader(pathlib.Path(path).read_text().splitlines())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", nargs="+", metavar="SEED", help="print the commands of these seeds")
    parser.add_argument("--read", nargs="+", metavar="CSV", help="keep what these tables of runs have of the rows")
    given = parser.parse_args()
    if given.read:
        with KEPT.open("w", newline="") as file:
            writer = csv.DictWriter(file, NAMES + FIGURES, lineterminator="\n")
            writer.writeheader()
            writer.writerows(select(rows_of(*given.read)))
    kept = rows_of(KEPT) if KEPT.exists() else []
    if given.print:
        print("\n".join(commands(kept, given.print)))
    elif not given.read and kept:
        before, _, rest = DOCUMENT.read_text().partition(BEGIN)
        DOCUMENT.write_text(before + BEGIN + tables(kept) + END + rest.partition(END)[2])
        draw(kept, FIGURE)


if __name__ == "__main__":
    main()
