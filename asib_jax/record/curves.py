"""A run's curves, read from its metrics alone: what every phase logged after each of its epochs, and their picture."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from asib_jax.record.canvas import BLUE, GREEN, GREY, ORANGE, PINK, RED, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KEY = re.compile(r"(?!time/)(.+)/epoch(\d+)/([^/]+)")
_STAGE = re.compile(r"stage(\d+)/")
_LINES = {  # by what was measured on validation: its name, colour and dashes
    "student": ("student", BLUE, "-"),
    "control": ("student alone", ORANGE, "-"),
    "synergy": ("synergy ensemble", GREEN, "-"),
    "average": ("teachers' average", GREY, "--"),
    "base": ("what synergy is added to", GREEN, "--"),
    "without_teachers": ("synergy, teachers zeroed", PINK, ":"),
}


class Epochs(NamedTuple):
    """Of one phase, its values after each epoch by name; stage: from 1, 0 of a phase that belongs to none.

    curve: what it continues, "teacher1", "a", "b" or "control/b": the phases of all stages make one curve.
    """

    curve: str
    stage: int
    values: list[dict[str, Any]]


def read(metrics: Mapping[str, Any]) -> list[Epochs]:
    """The phases that logged epochs, in their order, of the metrics of a run."""
    phases: dict[str, dict[int, dict[str, Any]]] = {}
    for key, value in metrics.items():
        if found := _KEY.fullmatch(key):
            phase, epoch, name = found.groups()
            phases.setdefault(phase, {}).setdefault(int(epoch), {})[name] = value
    return [
        Epochs(_STAGE.sub("", phase), int(stage[1]) if (stage := _STAGE.search(phase)) else 0, [*epochs.values()])
        for phase, epochs in phases.items()
    ]


def points(phases: Sequence[Epochs], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs from 1 over all phases, and the values of that name, NaN where there is none.

    Between two stages there is a point of NaN, for what stands before one need not be what the other ended with.
    """
    x, y, start = [], [], 1
    for phase in phases:
        x += [*range(start, start + len(phase.values)), start + len(phase.values) - 0.5]
        y += [*(np.nan if (value := values.get(name)) is None else value for values in phase.values), np.nan]
        start += len(phase.values)
    return np.array(x[:-1], float), np.array(y[:-1], float)


def draw_curves(metrics: Mapping[str, Any]) -> "Figure":
    """Loss and validation accuracies over the epochs, a column for each network or step; the control's in that of the
    student, whose axis it shares."""
    from matplotlib.ticker import MaxNLocator

    phases = read(metrics)
    columns = [curve for curve in dict.fromkeys(phase.curve for phase in phases) if curve != "control/b"]
    margins = {"left": 0.55, "right": 0.1, "bottom": 0.45, "top": 0.4, "wspace": 0.15, "hspace": 0.3}
    figure = new_figure(max(6.4, 3.4 * len(columns)), 6.0, "" if columns else "nothing was trained", **margins)
    axes = figure.subplots(2, len(columns), squeeze=False) if columns else np.empty((2, 0))
    for (losses, accuracies), curve in zip(axes.T, columns):
        own = [phase for phase in phases if phase.curve == curve]
        control = [phase for phase in phases if curve == "b" and phase.curve == "control/b"]
        losses.set_title({"a": "A-Step: fusion network", "b": "B-Step: student"}.get(curve, curve), fontsize=10, pad=14)
        _draw_losses(losses, own, control)
        _draw_accuracies(accuracies, own + control)
        if curve == "b":
            _mark_gate(accuracies, own)
        for axis in (losses, accuracies):
            _mark_stages(axis, own)
            axis.set_xlabel("epoch", fontsize=9)
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
        losses.set_ylabel("loss" if curve == columns[0] else "", fontsize=9)
        accuracies.set_ylabel("validation accuracy %" if curve == columns[0] else "", fontsize=9)
    return figure


def _plot(axis: "Axes", x: np.ndarray, y: np.ndarray, **style: Any) -> None:
    if np.isfinite(y).any():
        axis.plot(x, y, linewidth=1.4, marker="." if len(x) < 8 else "", **style)


def _draw_losses(axis: "Axes", phases: Sequence[Epochs], control: Sequence[Epochs]) -> None:
    name, colour = {"a": ("A-Step", GREEN), "b": ("student", BLUE)}.get(phases[0].curve, (phases[0].curve, RED))
    (x, loss), (_, entropy) = points(phases, "loss"), points(phases, "ce")
    _plot(axis, x, loss, color=colour, label=name)
    if not np.array_equal(entropy, loss, equal_nan=True):
        _plot(axis, x, entropy, color=colour, linestyle=":", label=f"{name}, from labels")
    _plot(axis, *points(control, "loss"), color=ORANGE, label="student alone")


def _draw_accuracies(axis: "Axes", phases: Sequence[Epochs]) -> None:
    """phases: of the curve, and of the control's, each from its first epoch on."""
    found = {(phase.curve, name) for phase in phases for values in phase.values for name in values}
    for curve, key in sorted(pair for pair in found if pair[1].startswith("val_")):
        label, colour, dashes = _LINES.get(key[4:], (key[4:], RED, "-"))
        x, y = points([phase for phase in phases if phase.curve == curve], key)
        _plot(axis, x, 100 * y, color=colour, linestyle=dashes, label=label)


def _mark_stages(axis: "Axes", phases: Sequence[Epochs]) -> None:
    start = 0.5
    for phase in phases if len(phases) > 1 else []:
        end = start + len(phase.values)
        if phase.stage % 2 == 0:
            axis.axvspan(start, end, color="black", alpha=0.06, linewidth=0)
        axis.annotate(
            f"stage {phase.stage}", ((start + end) / 2, 1), xycoords=("data", "axes fraction"), fontsize=7, color=GREY,
            ha="center", va="bottom",
        )  # fmt: skip
        start = end


def _mark_gate(axis: "Axes", phases: Sequence[Epochs]) -> None:
    """Where the student began to learn from synergy, of a run that had any."""
    if not np.isfinite(points(phases, "val_synergy")[1]).any():
        return
    epochs, gate = points(phases, "gate")
    if not (gate > 0).any():
        axis.plot([], [], color="black", linestyle="-.", label="the gate to synergy stays shut")
        return
    axis.axvline(epochs[gate > 0][0], color="black", linestyle="-.", linewidth=1, label="the gate to synergy opens")
