"""What a finished run leaves, on disk and read back: all that evaluation needs (SPEC 7)."""
import collections
import dataclasses
import json
import pathlib
from typing import Any

import jax

from asib_jax import build, checkpoint, pretrained, recipe as recipes
from asib_jax.experiment import Record
from asib_jax.models.ensemble import Networks, Variables
from asib_jax.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Finished:
    """All variables, the students ({"params", "batch_stats"}), and how many B-steps distilled from each target.

    students: "last" and "best" (on validation) and, where the run had a control, "control_last" and "control_best".
    """

    variables: Variables
    students: dict[str, dict[str, Any]]
    distilled_steps: collections.Counter


def save(record: Record, recipe: Recipe, nets: Networks, finished: Finished) -> None:
    """Everything trained or drawn at random here, in the checkpoint `final`; imported backbones by digest alone."""
    variables = jax.device_get(finished.variables)
    trained = {name: variables.of(name) for name in variables.params}
    for name, options in zip(nets.teacher_names, recipe.teachers):
        if options.weights:
            record.log(f"weights/{name}", pretrained.digest(options.weights))
        if options.weights and not recipe.use_teacher_finetuning:
            adapter = {child: leaves for child, leaves in variables.params[name].items() if child == "distill_adapter"}
            trained[name] = {"params": adapter, "batch_stats": {}}
    for name, steps in finished.distilled_steps.items():
        record.log(f"distilled_steps/{name}", steps)
    record.save()  # before the checkpoint, whose presence says that the run can be evaluated
    checkpoint.save(record.folder / "checkpoints" / "final", {"variables": trained, "students": finished.students})


def read_recipe(folder: pathlib.Path) -> Recipe:
    """The recipe of the run in `folder`. FileNotFoundError if there is none."""
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} is no run folder: {path.name} is missing")
    return recipes.read(json.loads(path.read_text()))


def load(folder: pathlib.Path, recipe: Recipe, nets: Networks, image_shape: tuple[int, ...]) -> Finished:
    """The finished run in `folder`.

    Raises:
      FileNotFoundError: it did not finish.
      ValueError: the checkpoint is damaged, or a teacher's weights are no longer the file the run used.
    """
    stored = checkpoint.restore(folder / "checkpoints" / "final")
    metrics = json.loads((folder / "metrics.json").read_text())
    params, stats = {}, {}
    for name, model, options in zip(nets.teacher_names, nets.teachers, recipe.teachers):
        if not options.weights or recipe.use_teacher_finetuning:
            continue  # stored whole
        if pretrained.digest(options.weights) != metrics[f"weights/{name}"]:
            raise ValueError(f"{options.weights} ({name}.weights) is not the file this run used: its SHA-256 is not "
                             f"{metrics[f'weights/{name}']}")
        backbone = pretrained.import_weights(pretrained.load_weights(options.weights),
                                             build.init_network(model, recipe.seed, name, image_shape))
        params[name], stats[name] = backbone["params"], backbone["batch_stats"]
    for name, variables in stored["variables"].items():
        params[name] = {**params.get(name, {}), **variables["params"]}
        if variables["batch_stats"]:
            stats[name] = variables["batch_stats"]
    prefix = "distilled_steps/"
    steps = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
    return Finished(Variables(params, stats), stored["students"], collections.Counter(steps))
