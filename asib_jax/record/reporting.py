"""What a person sees of a run: what it is, a progress bar, curves and tables."""

import contextlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
from tqdm import tqdm

from asib_jax.data import statistics
from asib_jax.data.parts import Data
from asib_jax.data.sources import OWN
from asib_jax.engine import hosts
from asib_jax.errors import UserError
from asib_jax.recipe import Recipe, keys, told_by_data
from asib_jax.record import curves, events

logger = logging.getLogger("asib_jax")


class Reporter(contextlib.AbstractContextManager):
    """Progress bars and curves of one run; leaving it ends a trace that is still open and flushes the curves.

    `tensorboard` writes event files to `folder/tensorboard`; `wandb` names a Weights & Biases project, "" for none,
    in which the run is called like its folder and carries `config`. `profile_steps` = (first, last) writes a jax
    profiler trace of the calls with those B-steps to `folder/profile`. earlier: the metrics that a run
    goes on from, of which TensorBoard's curves are drawn anew. Of several hosts the first alone does any of it.

    Raises UserError where `wandb` is asked for but not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        tensorboard: bool,
        wandb: str,
        config: dict[str, Any],
        profile_steps: tuple[int, ...] = (),
        earlier: Mapping[str, Any] | None = None,
    ):
        folder = Path(folder)
        first = hosts.is_first()
        self._profile_folder, self._profiling = folder / "profile", False
        self._profile_steps = profile_steps if first else ()
        self._wandb = _start_wandb(folder, wandb, config) if wandb and first else None
        self._tensorboard = None
        if tensorboard and first:
            for file in (folder / "tensorboard").glob("events.out.tfevents.*"):  # with epochs that come once more
                file.unlink()
            self._tensorboard = events.writer(folder / "tensorboard")
            self._draw(curves.read(earlier or {}))

    def _draw(self, phases: Sequence[curves.Epochs]) -> None:
        """What `scalars` has drawn of these phases."""
        epochs = Counter[str]()
        for phase in phases:
            for values in phase.values:
                epochs[phase.curve] += 1
                for name, value in values.items():
                    point = float("nan") if value is None else value
                    self._tensorboard.add_scalar(f"{phase.curve}/{name}", point, epochs[phase.curve])

    @staticmethod
    def epoch_bar(images: int, description: str) -> tqdm:
        """A bar over an epoch's images, with images/s and the time left: `with ... as bar: bar.update(batch_size)`.

        It shows on a terminal only and vanishes when done: the epoch's log line stays.
        """
        disable = None if hosts.is_first() else True
        return tqdm(total=images, desc=description, unit=" images", leave=False, disable=disable, dynamic_ncols=True)

    def scalars(self, values: dict[str, float], epoch: int) -> None:
        """Add a point to each named curve, at an epoch of its own: the control's lie over the student's."""
        values = {name: float(value) for name, value in values.items()}
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, epoch)
        if self._wandb:
            self._wandb.log({**values, "epoch": epoch})

    def final(self, settings: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """Add the final figures, each as a point of its own, and to TensorBoard's hyperparameters a row of these
        with the settings."""
        if self._tensorboard:
            from tensorboardX.summary import hparams

            points = {f"final/{name}": float(value) for name, value in figures.items()}
            for name, value in points.items():
                self._tensorboard.add_scalar(name, value, 0)
            plain = {name: str(value) if isinstance(value, tuple) else value for name, value in settings.items()}
            for part in hparams(plain, points):  # `add_hparams` would make a run of its own of them
                self._tensorboard.file_writer.add_summary(part)
        if self._wandb:
            self._wandb.summary.update(figures)

    def on_steps(self, optimizer: str, first: int, last: int) -> None:
        """Told which steps of an optimizer a call is about to do: starts and ends the profiler's trace, of whole calls
        with B-steps."""
        if optimizer != "b" or not self._profile_steps:
            return
        if not self._profiling and first <= self._profile_steps[0] <= last:
            jax.profiler.start_trace(str(self._profile_folder))
            self._profiling = True
        elif self._profiling and first > self._profile_steps[1]:
            self._stop_profile()

    def _stop_profile(self) -> None:
        jax.block_until_ready(jax.device_put(0.0) + 0.0)  # queued behind the steps in flight
        jax.profiler.stop_trace()
        self._profiling, self._profile_steps = False, ()  # once

    def __exit__(self, *exception) -> None:
        if self._profiling:
            self._stop_profile()
        elif self._profile_steps and exception[0] is None:
            logger.warning(
                "profile_steps=%s: this process did no such B-steps, so there is no trace", self._profile_steps
            )
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def _start_wandb(folder: Path, project: str, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ModuleNotFoundError:
        raise UserError(
            f'wandb={project!r} needs the wandb package: pip install wandb, or set the key wandb to ""'
        ) from None
    run = wandb.init(project=project, name=folder.name, id=folder.name, resume="allow", dir=str(folder), config=config)
    run.define_metric("*", step_metric="epoch")  # of each curve
    return run


def width(stream: TextIO | None = None) -> int:
    """Characters of a line on a stream, by default stderr: of its terminal, or 120 where it is none."""
    try:
        return os.get_terminal_size((stream or sys.stderr).fileno()).columns
    except (OSError, ValueError, AttributeError):  # no terminal, closed, not there
        return 120


def table(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Aligned lines; `align` has "<" for a column of text, ">" for one of numbers."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths)).rstrip() for row in rows
    ]


def describe(recipe: Recipe, data: Data, devices: Sequence[jax.Device]) -> None:
    """Log lines by which a reader verifies an ablation: data, and the active KD, IB/CCCP and freezing settings."""
    logger.info(
        "data: %s (%s); %d training (student), %d training (teachers), %d validation, %d test images, %d classes",
        data.origin,
        recipe.dataset.name,
        len(data.train.label),
        len(data.teacher_train.label),
        len(data.validation.label),
        len(data.test.label),
        data.num_classes,
    )
    logger.info(
        "devices: %d x %s%s, %s",
        len(devices),
        devices[0].device_kind,
        f" on {jax.process_count()} hosts" if jax.process_count() > 1 else "",
        recipe.compute_dtype,
    )
    _describe_copies(recipe, data)
    if recipe.teachers_only:
        return
    logger.info(
        "KD: target %s, ce_alpha %g, kd_alpha %g, tau %s, kd_max_ratio %g, feat_kd_alpha %g",
        recipe.kd_target,
        recipe.ce_alpha,
        recipe.kd_alpha,
        recipe.tau_schedule or recipe.tau,
        recipe.kd_max_ratio,
        recipe.feat_kd_alpha,
    )
    logger.info(
        "A-Step: %d epochs a stage, IB %s, CCCP %s, synergy_ce_alpha %g, synergy_kd_alpha %g, teachers' "
        "adapters %s, teachers %s",
        recipe.a_epochs,
        f"on (beta {recipe.ib_beta:g})" if recipe.use_ib else "off",
        f"on (alpha {recipe.cccp_alpha:g})" if recipe.use_cccp else "off",
        recipe.synergy_ce_alpha,
        recipe.synergy_kd_alpha,
        "trained" if recipe.train_distill_adapter_only else "fixed",
        "trained" if recipe.trains_teachers else "frozen",
    )
    levels = recipe.student_freeze_level if recipe.use_partial_freeze else "off"
    logger.info("PPF: student freeze level %s, freeze_bn %s", levels, recipe.student_freeze_bn)


def _describe_copies(recipe: Recipe, data: Data) -> None:
    """What teachers that do not see all images see."""
    if data.sees is None:
        return
    sizes, whole = data.sees.sum(axis=1), data.sees.shape[1]
    if twice := int((~data.sees.any(axis=0)).sum()) if recipe.folds else 0:
        logger.info("teacher_folds: %d training images that validation has, too, are seen by no copy", twice)
    if recipe.folds:
        asked = "the copies together" if recipe.teacher_deploy == "copies" else "one more, trained on all,"
        logger.info(
            "teacher_folds: each teacher is trained %d times, on %d to %d of %d images; of a training image the copy "
            "that did not see it is asked, of validation and test images %s",
            *(recipe.folds, sizes.min(), sizes.max(), whole, asked),
        )
    else:
        logger.info(
            "teacher_holdout: teachers are trained on %d of %d images; A- and B-Step train on %s",
            *(sizes[0], whole, "the others" if recipe.student_images == "holdout" else "all"),
        )


def describe_told(recipe: Recipe, given: Recipe, data: Data) -> None:
    """Log what the data told the complete `recipe` of a run. given: the recipe as it was given.

    Warns of given weights that may expect something else, and of networks that are to learn one's own images from
    scratch under a mean and std that are those of others.
    """
    told, values = told_by_data.empty(given), keys.flat(recipe)
    networks = recipe.networks
    for part in ("mean", "std"):
        names = [f"{key}.{part}" for key in networks if f"{key}.{part}" in told]
        if names:
            numbers = ", ".join(f"{value:.4f}" for value in values[names[0]])
            logger.info("%s, not given: (%s) of the training images", ", ".join(names), numbers)
    for key, network in networks.items():
        unknown = [name for name in (f"{key}.mean", f"{key}.std") if name in told]
        if network.weights and unknown:
            logger.warning(
                "%s.weights=%r: how they expect images to be normalised is not known, so it is done as the training "
                "images are; if that is wrong set %s",
                key,
                network.weights,
                " and ".join(unknown),
            )
    if recipe.uses_fusion and "enable_kd_after_syn_acc" in told:
        logger.info("enable_kd_after_syn_acc, not given: %.3g", recipe.gate)
    scratch = {
        key: network
        for key, network in networks.items()
        if not network.weights and not {f"{key}.mean", f"{key}.std"} <= set(told)
    }
    if scratch and recipe.dataset.name in OWN and hosts.is_first():  # the others have the same images
        found = statistics.of_images(data.teacher_train.image)
        if unlike := [key for key, network in scratch.items() if statistics.differ(network, found)]:
            logger.warning(
                "%s: trained from scratch with the given mean and std, but the training images have mean (%s) and std "
                "(%s): give those, or leave both empty, as the profile `:own` does",
                ", ".join(unlike),
                *(", ".join(f"{value:.4f}" for value in values) for values in found),
            )
