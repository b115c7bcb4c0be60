"""Pictures of a finished run: its curves, and on test the best student's confusions, classes and worst mistakes."""

import itertools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from asib_jax.data.parts import Data
from asib_jax.record.canvas import BLUE, GREEN, GREY, ORANGE, PINK, RED, new_figure
from asib_jax.record.curves import draw_curves
from asib_jax.record.predictions import TOP, TOP_FROM, confusion, printable, probabilities, top_correct, worst_mistakes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("asib_jax")

FOLDER = "pictures"
_DPI = 100
_WITH_NUMBERS, _WITH_NAMES = 30, 120  # classes up to which a picture has room for these
_MISTAKES = (4, 6)  # rows and columns


def draw(
    folder: Path,
    metrics: Mapping[str, Any],
    data: Data,
    logits: np.ndarray | None,
    named: Mapping[str, np.ndarray] | None = None,
    known: np.ndarray | None = None,
) -> None:
    """Write the pictures of the run in `folder` to `folder/pictures`; where one cannot be drawn, warn with the reason.

    logits: [N, C] of the best student on test; None of a run without one, which has curves alone. named, known: of
    teachers that know some classes, as `Results` has them.
    """
    figures: dict[str, Callable[[], Figure]] = {"curves": lambda: draw_curves(metrics)}
    if logits is not None:
        guesses, labels, names = probabilities(logits), data.test.label, data.class_names
        figures |= {
            "confusion": lambda: draw_confusion(confusion(labels, guesses), names),
            "classes": lambda: draw_classes(labels, guesses, names),
            "mistakes": lambda: draw_mistakes(data.test.image, labels, guesses, names),
        }
        if named and known is not None:
            every = {**named, "student": guesses.argmax(axis=1)}
            figures["specialists"] = lambda: draw_specialists(labels, every, known, names)
    for name, make in figures.items():
        try:
            with warnings.catch_warnings(record=True, action="always") as said:
                figure = make()
                (folder / FOLDER).mkdir(exist_ok=True)
                figure.savefig(folder / FOLDER / f"{name}.png", dpi=_DPI)
            if said:
                logger.warning("picture %s: %s%s", name, said[0].message, " ..." if len(said) > 1 else "")
        except ModuleNotFoundError as error:
            logger.warning("no pictures: %s; pip install matplotlib, or set pictures to False", error)
            return
        except Exception as error:  # whatever it is: the run has finished
            logger.warning("picture %s could not be drawn: %s: %s", name, type(error).__name__, error)


def _ticks(put: Callable[..., Any], names: Sequence[str], **style: Any) -> None:
    """The name of each class where there is room; else matplotlib's numbers stay."""
    if len(names) <= _WITH_NAMES:
        size = 9 if len(names) <= _WITH_NUMBERS else 6
        put(range(len(names)), names, fontsize=size, parse_math=False, **style)


def _turn(names: Sequence[str]) -> int:
    """The angle at which they have room beside each other."""
    return 0 if max(map(len, names)) <= 2 and len(names) <= _WITH_NUMBERS else 90


def _short(name: str, most: int = 18) -> str:
    name = printable(name)
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _percent(correct: float, count: float) -> str:
    return f"{100 * correct / max(count, 1):.2f} %"


def draw_confusion(cells: np.ndarray, names: Sequence[str]) -> "Figure":
    """The matrix [C, C] of `confusion`, its rows coloured by shares of their class, with counts where there is room,
    else beside a list of the most frequent mistakes."""
    from matplotlib.colors import PowerNorm

    classes, right, count = len(cells), cells.trace(), cells.sum()
    few = classes <= _WITH_NUMBERS
    side = max(5.0, 0.42 * classes) if few else 9.6
    title = f"best student on test: {right} of {count} right, {_percent(right, count)}"
    figure = new_figure(side + (1.4 if few else 4.0), side + 0.6, title)
    axis, *aside = figure.subplots(1, 1 if few else 2, squeeze=False, width_ratios=[1] if few else [side, 3])[0]
    shares = cells / np.maximum(cells.sum(axis=1, keepdims=True), 1)
    # The root lets one mistake in a hundred be seen.
    shown = axis.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    bar = figure.colorbar(shown, ax=axis, shrink=0.4, ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
    bar.ax.set_yticklabels(["0", "1 %", "5 %", "10 %", "25 %", "50 %", "100 %"], fontsize=8)
    bar.set_label("share of the true class", fontsize=9)
    _ticks(axis.set_xticks, [*map(_short, names)], rotation=_turn(names))
    _ticks(axis.set_yticks, [*map(_short, names)])
    axis.set_xlabel("predicted class", fontsize=9)
    axis.set_ylabel("true class", fontsize=9)
    if not few:
        aside[0].set_axis_off()
        told = "\n".join(["most frequent mistakes", *frequent_mistakes(cells, names)])
        aside[0].text(0, 1, told, va="top", fontsize=8, linespacing=1.5, parse_math=False)
        return figure
    for true, predicted in np.argwhere(cells):
        colour = "white" if shares[true, predicted] > 0.4 else "black"
        axis.text(predicted, true, str(cells[true, predicted]), ha="center", va="center", fontsize=8, color=colour)
    return figure


def draw_classes(labels: np.ndarray, guesses: np.ndarray, names: Sequence[str]) -> "Figure":
    """The accuracy of each class, sorted, and from 20 classes on its top-5 accuracy above it."""
    right, sizes = confusion(labels, guesses).diagonal(), np.bincount(labels, minlength=len(names))
    there = np.flatnonzero(sizes)
    there = there[np.argsort(right[there] / sizes[there], kind="stable")]
    named, place = len(there) <= _WITH_NAMES, np.arange(len(there))
    figure = new_figure(float(np.clip(0.14 * len(there), 7, 13.5)), 4.6, "best student on test, class by class")
    axis = figure.subplots()
    label = f"accuracy; of all {_percent(right.sum(), len(labels))}"
    axis.bar(place, 100 * right[there] / sizes[there], color=BLUE, width=0.8 if named else 1.0, label=label)
    axis.axhline(100 * right.sum() / len(labels), color="black", linewidth=1, linestyle="--")
    if len(names) >= TOP_FROM:
        top = top_correct(labels, guesses)
        share = 100 * np.bincount(labels[top], minlength=len(names))[there] / sizes[there]
        label = f"top-{TOP} accuracy; of all {_percent(top.sum(), len(labels))}"
        mark: dict[str, Any] = {"marker": "_", "markersize": 6, "markeredgewidth": 2}
        mark = mark if named else {"marker": ".", "markersize": 3}
        axis.plot(place, share, color=ORANGE, linestyle="none", label=label, **mark)
    ticks, turned = [_short(names[int(k)]) for k in there], _turn(names)
    if len(there) <= _WITH_NUMBERS:
        between = "  " if turned else "\n"
        ticks = [f"{name}{between}{right[k]}/{sizes[k]}" for name, k in zip(ticks, there)]
    _ticks(axis.set_xticks, ticks, rotation=turned)
    axis.set_xlim(-0.7, len(there) - 0.3)
    axis.set_ylim(0, 102)
    axis.set_xlabel("class, from the worst to the best", fontsize=9)
    axis.set_ylabel("accuracy %", fontsize=9)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, reverse=True)
    return figure


def draw_specialists(
    labels: np.ndarray, named: Mapping[str, np.ndarray], known: np.ndarray, names: Sequence[str]
) -> "Figure":
    """The accuracy of each class of everything in `named`, classes [N] by name: "teacher1", ..., "average", "student".

    known: which teacher knows which class, [T, C]; these are shaded in its colour.
    """
    sizes, classes = np.bincount(labels, minlength=len(names)), np.arange(len(names))
    figure = new_figure(float(np.clip(0.9 * len(names), 7, 13.5)), 4.2, "who knows what: test accuracy, class by class")
    axis, colours = figure.subplots(), itertools.cycle((BLUE, ORANGE, PINK, RED))
    width = 0.84 / len(named)
    for k, (name, found) in enumerate(named.items()):
        colour = {"average": GREY, "student": GREEN}.get(name) or next(colours)
        right = np.bincount(labels[found == labels], minlength=len(names))
        own = known[k] if k < len(known) else np.ones(len(names), bool)
        told = "teachers' average" if name == "average" else name
        label = f"{told}; of {'all' if own.all() else 'its classes'} {_percent(right.sum(), sizes[own].sum())}"
        place = classes + (k - (len(named) - 1) / 2) * width
        axis.bar(place, 100 * right / np.maximum(sizes, 1), width, color=colour, label=label)
        for one in classes[own] if k < len(known) else ():
            axis.axvspan(one - 0.5, one + 0.5, color=colour, alpha=0.14, linewidth=0, zorder=0)
    _ticks(axis.set_xticks, [*map(_short, names)], rotation=_turn(names))
    axis.set_xlim(-0.5, len(names) - 0.5)
    axis.set_ylim(0, 102)
    axis.set_xlabel("class; shaded: those that a teacher knows", fontsize=9)
    axis.set_ylabel("accuracy %", fontsize=9)
    axis.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    return figure


def draw_mistakes(images: Any, labels: np.ndarray, guesses: np.ndarray, names: Sequence[str]) -> "Figure":
    """Images [N, H, W, ch] of which the student is sure and wrong."""
    rows, columns = _MISTAKES
    worst = worst_mistakes(labels, guesses, rows * columns)
    rows = max(1, -(-len(worst) // columns))
    title = "the best student's most confident mistakes on test: true class, predicted class and its probability"
    title = title if len(worst) else "the best student made no mistake on test"
    margins = {"left": 0.05, "right": 0.05, "bottom": 0.05, "top": 0.7, "wspace": 0.05, "hspace": 0.25}
    figure = new_figure(1.75 * columns, 2.05 * rows + 0.5, title, **margins)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, row, pixels in zip(axes, worst, images[worst] if len(worst) else ()):
        axis.imshow(
            pixels if pixels.shape[-1] == 3 else pixels[..., 0], cmap="gray", vmin=0, vmax=255, interpolation="nearest"
        )
        true, predicted = labels[row], guesses[row].argmax()
        text = f"{_short(names[true])}\n→ {_short(names[predicted])}  {100 * guesses[row, predicted]:.1f} %"
        axis.set_title(text, fontsize=8, parse_math=False)
    return figure


def frequent_mistakes(cells: np.ndarray, names: Sequence[str], most: int = 20) -> list[str]:
    """Lines of the pairs of classes that [C, C] cells confuse most often."""
    wrong = np.where(np.eye(len(cells), dtype=bool), 0, cells).ravel()
    order = [cell for cell in np.argsort(-wrong, kind="stable")[:most] if wrong[cell]]
    pairs = [(wrong[cell], *divmod(cell, len(cells))) for cell in order]
    return [f"{number}  {_short(names[true])} → {_short(names[guess])}" for number, true, guess in pairs]
