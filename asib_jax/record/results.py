"""The final table of a run: every accuracy on test, measured once, and what the student was distilled from (SPEC 7)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from asib_jax.data.classes import text_of
from asib_jax.engine.evaluate import Evaluator, of_fusion, predictions
from asib_jax.engine.progress import BEFORE
from asib_jax.models.ensemble import Networks, Variables
from asib_jax.objectives.targets import TRAINING_FREE
from asib_jax.recipe import Recipe, TeacherRecipe
from asib_jax.record.finished import Finished
from asib_jax.record.predictions import TOP, TOP_FROM, probabilities, top_correct
from asib_jax.record.reporting import table

_TITLES = {  # of the table's rows, in their order; the teachers come first
    "average": "teachers' average",
    "training_free": "best training-free",
    "synergy": "synergy ensemble",
    "base": "base",
    "without_teachers": "synergy, teachers zeroed",
    "control_last": "student alone, last",
    "control_best": "student alone, best",
    "last": "student, last",
    "best": "student, best",
}


@dataclasses.dataclass(frozen=True)
class Results:
    """counts[split][name] correct predictions of sizes[split] examples; shares of B-steps by the target they used;
    skipped: steps by their phase; as_given: the students that no training bettered; teachers: as `Finished` has them.

    moving: "last" or "best", by the name of what training changed and whose name says not which parameters it has.
    logits: [N, C] of the best student on test; None of a run without one. training_free: which `kd_target` or teacher
    "training_free" counts, the one that is best on validation.
    known: `Networks.known`; own[split][name]: images of the classes of a teacher that does not know all; named: where
    there is one, what `predictions` has of test.
    Raises ValueError for a count that its split cannot have.
    """

    counts: dict[str, dict[str, int]]
    sizes: dict[str, int]
    shares: dict[str, float]
    moving: dict[str, str]
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    as_given: frozenset[str] = frozenset()
    logits: np.ndarray | None = None
    teachers: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    training_free: str = ""
    known: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0), bool))
    own: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    named: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        wrong = [
            f"{split}: {count} {name} of {self.sizes[split]}"
            for split, counts in self.counts.items()
            for name, count in counts.items()
            if not 0 <= count <= self.sizes[split]
        ]
        if wrong:
            raise ValueError(f"these counts are impossible: {'; '.join(wrong)}")

    @property
    def summary(self) -> dict[str, float]:
        """The scalars of the run's row in `summary.csv`: `test_acc_best`, named by split, network and parameters."""
        row = {}
        for split, counts in self.counts.items():
            for name, count in counts.items():
                column = name if name == "disagreement" else f"acc_{name}"
                which = f"_{self.moving[name]}" if name in self.moving else ""
                row[f"{split}_{column}{which}"] = count / self.sizes[split]
                if name in self.own.get(split, {}):
                    row[f"{split}_acc_{name}_own{which}"] = count / self.own[split][name]
        row |= {f"{split}_count": size for split, size in self.sizes.items()}
        for name, told in self.teachers.items():
            row |= {f"{part}_{name}": told[part] for part in ("train_acc", "train_entropy", "temperature")}
            row[f"validation_entropy_{name}"] = told["val_entropy"]
        if self.shares:
            row["synergy_steps_share"] = self.shares.get("synergy", 0.0)  # unmixed synergy
        if self.skipped:
            row["skipped_steps"] = sum(self.skipped.values())
        return row


def final_results(recipe: Recipe, nets: Networks, finished: Finished, *evaluators: Evaluator) -> Results:
    """Evaluate everything on each split, the last of which is test. The synergy ensemble asks with the student that
    training ended with."""
    counts, alone = {}, Networks(nets.student.clone(adapter_dim=0))  # a classifier needs neither adapter nor teachers
    for evaluator in evaluators:
        row = dict(evaluator.teacher_counts)
        if len(nets.teachers) == 1:
            row = {"teacher1": row["teacher1"]}
        if nets.ib_mbm is not None:
            ensemble = evaluator(nets, finished.variables)
            row |= {name: ensemble[name] for name in of_fusion(nets)}
        for name, student in finished.students.items():
            own = Variables({"student": student["params"]}, {"student": student["batch_stats"]})
            row[name] = evaluator(alone, own)["student"]
        counts[evaluator.name] = row
    training_free = _add_training_free(recipe, counts, evaluators) if len(nets.teachers) > 1 else ""
    logits = _best_logits(finished, evaluators[-1]) if "best" in finished.students else None
    if logits is not None and logits.shape[1] >= TOP_FROM:
        counts["test"]["top5_best"] = int(top_correct(evaluators[-1].split.label, probabilities(logits)).sum())
    total = sum(finished.distilled_steps.values())
    shares = {name: steps / total for name, steps in sorted(finished.distilled_steps.items())}
    sizes = {evaluator.name: evaluator.count for evaluator in evaluators}
    special = {name: known for name, known in zip(nets.teacher_names, nets.known) if not known.all()}
    theirs = {part.name: {name: part.images_of(known) for name, known in special.items()} for part in evaluators}
    as_given = frozenset(name for name, when in finished.when.items() if when == BEFORE)
    skipped, moving = {**finished.skipped_steps}, moving_parameters(recipe)
    test = evaluators[-1]
    named = predictions(test.teacher_logits, nets.known, test.temperatures) if special else {}
    told = (skipped, as_given, logits, finished.teachers, training_free, nets.known, theirs, named)
    return Results(counts, sizes, shares, moving, *told)


def _add_training_free(recipe: Recipe, counts: dict[str, dict[str, int]], evaluators: Sequence[Evaluator]) -> str:
    """Count what needs no training and is best on validation, the first of equal ones; its name. At the temperature
    that steps begin with."""
    found = {evaluator.name: evaluator.training_free(recipe.first_tau) for evaluator in evaluators}
    best = max(found["validation"], key=found["validation"].__getitem__)
    for split, row in counts.items():
        row["training_free"] = found[split][best]
    return best


def _best_logits(finished: Finished, evaluator: Evaluator) -> np.ndarray:
    best = finished.students["best"]
    params = {**finished.variables.params["student"], **best["params"]}  # with the adapter, if any, that logits skip
    return evaluator.logits(Variables({"student": params}, {"student": best["batch_stats"]}))


def moving_parameters(recipe: Recipe) -> dict[str, str]:
    """`Results.moving`: of the ensemble, which has its student's, and of teachers that A-Steps train."""
    ended_with = "best" if recipe.restore_best else "last"
    moving = {"synergy": ended_with, "without_teachers": ended_with}
    moving |= {"base": ended_with} if recipe.base == "mixture" else {}
    if recipe.trains_teachers and not recipe.teachers_only:
        moving |= dict.fromkeys([*_teachers(recipe), "average", "training_free", "disagreement"], "last")
        moving.setdefault("base", "last")
    return moving


def _teachers(recipe: Recipe) -> dict[str, TeacherRecipe]:
    return {f"teacher{k}": teacher for k, teacher in enumerate(recipe.teachers, 1)}


def render(recipe: Recipe, results: Results, width: int = 120) -> str:
    """The table, with 95 % intervals that invert the score test (Wilson, 1927), and what belongs below it.

    width: in characters; a table that is wider leaves out of which parameters its rows are.
    """
    from scipy.stats import binomtest  # takes a second

    test, validation, count = results.counts["test"], results.counts["validation"], results.sizes["test"]
    titles = {name: f"{name} ({teacher.name})" for name, teacher in _teachers(recipe).items()} | _TITLES
    titles |= {"base": f"base ({recipe.base})", "training_free": f"best training-free ({results.training_free})"}
    rows = [("name", "parameters", "correct", "test %", "95 % interval", "validation %")]
    inflated = False
    for name, title in titles.items():
        if name not in test:
            continue
        low, high = binomtest(test[name], count).proportion_ci(method="wilson")
        share = validation[name] / results.sizes["validation"]
        marked = _saw_validation(recipe, results.training_free if name == "training_free" else name)
        inflated = inflated or marked
        rows.append(
            (
                title,
                _parameters(recipe, results, name),
                f"{test[name]}",
                f"{100 * test[name] / count:.2f}",
                f"{100 * low:.2f} to {100 * high:.2f}",
                f"{100 * share:.2f}{'*' if marked else ''}",
            )
        )
    shown = table(rows, "<<>>>>")
    if max(map(len, shown)) > width:
        shown = table([(title, *figures) for title, _, *figures in rows], "<>>>>")
    lines = [f"{count} test images, {results.sizes['validation']} validation images", *shown, ""]
    if inflated:
        lines.append("* inflated: the teachers' or the student's weights were fitted on these images too")
    for name, images in results.own.get("test", {}).items():
        known, share = results.known[list(titles).index(name)], 100 * test[name] / images
        lines.append(
            f"{name} knows {known.sum()} of {len(known)} classes: {share:.2f} % of the {images} test images of these"
        )
    if len(results.known) and (unknown := np.flatnonzero(~results.known.any(axis=0)).tolist()):
        lines.append(f"no teacher knows {text_of(unknown)}: labels alone teach these")
    if results.shares:
        lines.append(
            "distilled from: "
            + ", ".join(f"{name} {100 * share:.1f} % of B-steps" for name, share in results.shares.items())
        )
    if "top5_best" in test:
        lines.append(f"student, best: {100 * test['top5_best'] / count:.2f} % of test images among its top {TOP}")
    if "disagreement" in test:
        lines.append(f"teachers disagree on {100 * test['disagreement'] / count:.2f} % of test images")
    lines += [_memory(name, told, _saw_validation(recipe, name)) for name, told in results.teachers.items()]
    skipped = [f"{count} of {phase}" for phase, count in results.skipped.items() if count]
    if skipped:
        lines.append(f"skipped steps, whose loss or gradient was not finite: {', '.join(skipped)}")
    return "\n".join(lines)


def _memory(name: str, told: dict[str, float], saw_validation: bool) -> str:
    """How far a teacher has memorised what it teaches."""
    taught, other = 100 * told["train_acc"], 100 * told["val_acc"]
    divided = f"; its logits divided by {told['temperature']:.4g}" if told["temperature"] != 1 else ""
    if saw_validation:
        against = "validation images were seen, too, so that its test % alone tells how much of this is memory"
    else:
        against = f"{other:.1f} % of validation: a gap of {taught - other:.0f} points"
    return f"{name}: {taught:.1f} % of the images that it teaches, {against}{divided}"


def _parameters(recipe: Recipe, results: Results, name: str) -> str:
    """Which parameters of a row's network were measured."""
    if name in ("synergy", "without_teachers") or (name == "base" and recipe.base == "mixture"):
        return f"{results.moving[name]} student, best A-epoch"
    if name in results.moving:
        return "as the A-Steps left them"
    told = {"average": "as above", "training_free": "best on validation", "base": "the teachers'"}
    if name in told:
        return told[name]
    if teacher := _teachers(recipe).get(name):
        if recipe.folds and recipe.teacher_deploy == "copies":
            return f"{recipe.folds} copies, best epochs"
        return "best epoch" if teacher.epochs else "as given"
    return "as given" if name in results.as_given else f"{name.removeprefix('control_')} epoch"


def _saw_validation(recipe: Recipe, name: str) -> bool:
    """Whether validation flatters this row: a network behind it began with weights that were fitted on the images."""
    teachers = {name: teacher.saw_validation for name, teacher in _teachers(recipe).items()}
    student = recipe.model.student.saw_validation
    average = any(teachers.values())
    several = dict.fromkeys(("average", *TRAINING_FREE), average)
    several |= {"synergy": average or student, "base": average or (student and recipe.base == "mixture")}
    return (teachers | several).get(name, student)
