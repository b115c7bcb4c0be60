"""What a finished run leaves, on disk and read back: all that evaluation needs (SPEC 7)."""

import collections
import dataclasses
import logging
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from asib_jax.engine.progress import Progress, of_network
from asib_jax.errors import UserError
from asib_jax.models.ensemble import Networks, Variables, init_network
from asib_jax.recipe import EARLIER, Recipe, TeacherRecipe, keys, read_stored, told_by_data
from asib_jax.record.experiment import Record
from asib_jax.record.files import read_json
from asib_jax.weights import checkpoint, origins
from asib_jax.weights.reading import read_weights

logger = logging.getLogger("asib_jax")

TOLD = ("train_acc", "val_acc", "train_entropy", "val_entropy", "temperature")
"""What is measured of a teacher that is ready, before anything learns from it (SPEC 13)."""


@dataclasses.dataclass(frozen=True)
class Finished:
    """All variables, the students ({"params", "batch_stats"}), how many B-steps distilled from each target, and how
    many steps of each phase were skipped.

    students: "last" and "best" (on validation) and, where the run had a control, "control_last" and "control_best";
        none of a run with teachers_only. when: the best ones were, in words (`progress.Best`).
    teachers: what was measured of them once they were ready (`TOLD`), by "teacher1", "teacher2", ...
    """

    variables: Variables
    students: dict[str, dict[str, Any]]
    distilled_steps: collections.Counter
    skipped_steps: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    when: dict[str, str] = dataclasses.field(default_factory=dict)
    teachers: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def temperatures(self, recipe: Recipe) -> np.ndarray:
        """Of the teachers [T]: as they were found, or as they are given. UserError where one is neither."""
        given = {f"teacher{k}": teacher.temperature for k, teacher in enumerate(recipe.teachers, 1)}
        found = {name: self.teachers.get(name, {}).get("temperature", value) for name, value in given.items()}
        if missing := [f"{name}/temperature" for name, value in found.items() if not value]:
            raise UserError(f"metrics.json is damaged: it has no {', '.join(missing)}")
        return np.array([*found.values()], np.float32)


def of(variables: Variables, progress: Progress, metrics: Mapping[str, Any]) -> Finished:
    """What the phases of a run that are over have come to; metrics: its own."""
    students: dict[str, dict[str, Any]] = {}
    when = {}
    for network, prefix in (("student", ""), ("control", "control_")):
        if network in progress.last:
            students |= {
                f"{prefix}last": of_network(progress.last[network], network),
                f"{prefix}best": of_network(progress.best[network].held, network),
            }
            when[f"{prefix}best"] = progress.best[network].when
    main, skipped = variables.only(variables.params.keys() - {"control"}), progress.watch.skipped
    return Finished(main, students, progress.distilled_steps, skipped, when, teachers_told(metrics))


def save(record: Record, recipe: Recipe, nets: Networks, finished: Finished) -> None:
    """Everything trained or drawn at random here, in the checkpoint `final`; imported backbones by digest alone."""
    variables = jax.device_get(finished.variables)
    trained = {name: variables.of(name) for name in variables.params}
    for name, options in zip(nets.teacher_names, recipe.teachers):  # copies are trained here, all of them
        if not changed_here(recipe, options):
            adapter = {child: leaves for child, leaves in variables.params[name].items() if child == "distill_adapter"}
            trained[name] = {"params": adapter, "batch_stats": {}}
    for name, steps in finished.distilled_steps.items():
        record.log(f"distilled_steps/{name}", steps)
    if "best" in finished.when:
        record.log("when/best", finished.when["best"])
    record.save()  # before the checkpoint, whose presence says that the run can be evaluated
    checkpoint.save(record.folder / "checkpoints" / "final", {"variables": trained, "students": finished.students})


def save_control(record: Record, finished: Finished) -> None:
    """The control's students, which are trained after all else is saved."""
    students = {name: student for name, student in finished.students.items() if name.startswith("control_")}
    record.log("when/control_best", finished.when["control_best"])
    checkpoint.save(record.folder / "checkpoints" / "control", students)


def changed_here(recipe: Recipe, teacher: TeacherRecipe) -> bool:
    """Whether a teacher's backbone is no longer what its given weights say, or there are none."""
    return teacher.epochs > 0 or recipe.trains_teachers


def read_recipe(folder: pathlib.Path) -> Recipe:
    """The recipe of the run in `folder`, with what its data told. UserError if there is none, or one of a version with
    other keys."""
    path = folder / "config.json"
    config = read_json(path)
    try:
        recipe = read_stored(config)
    except UserError as error:
        raise UserError(
            f"{path}: {error}; another version of this code wrote it, and can read it: about.json there "
            "has its revision"
        ) from error
    if absent := sorted(keys.flat(recipe).keys() - flatten_dict(config, sep=".").keys() - EARLIER.keys()):
        logger.warning("%s has no %s, which came later: their defaults are taken", path, ", ".join(absent))
    if told_by_data.empty(recipe):  # a run that is not finished may have had no data yet
        recipe = told_by_data.with_values(recipe, read_json(folder / "about.json").get("told_by_data", {}))
    return recipe


def load(folder: pathlib.Path, recipe: Recipe, nets: Networks, image_shape: tuple[int, ...]) -> Finished:
    """The finished run in `folder`.

    Raises UserError where it did not finish, the checkpoint is damaged, or a teacher's weights are no longer the file
    that the run used.
    """
    stored = checkpoint.restore(folder / "checkpoints" / "final")
    metrics = read_json(folder / "metrics.json")
    params, stats = {}, {}
    for name, model, options in zip(nets.teacher_names, nets.teachers, recipe.teachers):
        if changed_here(recipe, options):
            continue  # stored whole
        key = f"{name}.weights"
        if origins.digest(origins.locate(options.weights, key, options.weights_sha256)) != metrics[f"weights/{name}"]:
            raise UserError(
                f"{options.weights} ({key}) is not the file this run used: its SHA-256 is not "
                f"{metrics[f'weights/{name}']}"
            )
        random = init_network(model, recipe.seed, name, image_shape)
        backbone, _ = read_weights(options.weights, key, model, random, sha256=options.weights_sha256)
        params[name], stats[name] = backbone["params"], backbone["batch_stats"]
    for name, variables in stored["variables"].items():
        params[name] = {**params.get(name, {}), **variables.get("params", {})}
        if variables.get("batch_stats"):
            stats[name] = variables["batch_stats"]
    for name in (*nets.teacher_names, *nets.backbone_names):  # a checkpoint keeps nothing empty
        params.setdefault(name, {})
    for name in params.keys() - {"ib_mbm", "synergy_head"} - stats.keys():
        stats[name] = {}  # a network without BatchNorm
    distilled, skipped = (collections.Counter(_logged(metrics, f"{name}_steps")) for name in ("distilled", "skipped"))
    if wrong := [
        f"{name} {steps!r}" for name, steps in [*distilled.items(), *skipped.items()] if type(steps) is not int
    ]:
        raise UserError(f"{folder / 'metrics.json'} is damaged: of steps it has {', '.join(wrong)}")
    told = teachers_told(metrics)
    kinds = [(part, value) for own in told.values() for part, value in own.items()]
    if wrong := [f"{part} {value!r}" for part, value in kinds if type(value) is not float]:
        raise UserError(f"{folder / 'metrics.json'} is damaged: of teachers it has {', '.join(wrong)}")
    students = _students(folder, stored)
    return Finished(Variables(params, stats), students, distilled, skipped, _logged(metrics, "when"), told)


def teachers_told(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`Finished.teachers` of a run that has these metrics."""
    names = dict.fromkeys(key.partition("/")[0] for key in metrics if re.fullmatch(r"teacher\d+/temperature", key))
    return {name: {part: _number(metrics.get(f"{name}/{part}")) for part in TOLD} for name in names}


def _number(value: Any) -> Any:
    return float("nan") if value is None else value  # as the record writes it


def _logged(metrics: dict[str, Any], name: str) -> dict[str, Any]:
    """What is logged under `name`/."""
    return {key.removeprefix(f"{name}/"): value for key, value in metrics.items() if key.startswith(f"{name}/")}


def load_students(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The students alone of the finished run in `folder`. Errors: those of `checkpoint.restore`."""
    return _students(folder, checkpoint.restore(folder / "checkpoints" / "final"))


def load_student(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """One of them. UserError for a name that the run has not; errors: those of `checkpoint.restore`."""
    students = load_students(folder)
    if name not in students:
        raise UserError(f"--student={name}: the run in {folder} has {', '.join(sorted(students)) or 'no student'}")
    return students[name]


def _students(folder: pathlib.Path, stored: dict[str, Any]) -> dict[str, dict[str, Any]]:
    students, control = stored.get("students", {}), folder / "checkpoints" / "control"
    if control.exists():
        students = students | checkpoint.restore(control)
    return {name: {"batch_stats": {}, **student} for name, student in students.items()}
