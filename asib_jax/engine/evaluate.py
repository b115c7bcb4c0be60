"""Correct predictions of networks and of the synergy ensemble on a split, every example counted once (SPEC 7)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from asib_jax.data.sources import Split
from asib_jax.data.splits import evaluation_rows
from asib_jax.engine import devices
from asib_jax.engine.banks import Bank
from asib_jax.engine.compiled import Steps
from asib_jax.engine.feed import Feed, on_host
from asib_jax.models.ensemble import Networks, Variables, base, classify, fuse, keys_and_values, query, run_student
from asib_jax.models.kd_model import known
from asib_jax.objectives import inputs, losses, targets


def make_eval_step(nets: Networks, student: str = "student", axis_name: str | None = None) -> Callable:
    """`step(counts, variables, controls, batch) -> (counts, {})`: adds the batch's correct predictions.

    student: the name under `variables` of what `nets.student` is. controls: "size", the number of examples; rows of a
    batch beyond it count for nothing; with a fusion network "temperatures", as `inputs.divided` takes them. Counted are
    the student, under its name, and what `of_fusion` says. The student's outputs are those the batch brings, or are
    computed; the "teachers" of the batch are a tuple of `TeacherOutputs`, of each of their copies one, and what synergy
    says is `over_copies` of what it says to each. What was looked at is counted, too: "examples", and the sum of their
    "rows" modulo 2^32.
    """

    def step(counts: dict, variables: Variables, controls: dict, batch: dict) -> tuple[dict, dict]:
        outputs = batch["student"] if "student" in batch else run_student(nets, variables, batch["image"], student)
        logits = {student: outputs.logit}
        if nets.ib_mbm is not None:
            q = query(nets, variables, outputs.feat)
            copies = [inputs.divided(controls, teachers) for teachers in batch["teachers"]]
            read = [keys_and_values(nets, variables, teachers) for teachers in copies]

            codes = [fuse(nets, variables, q, kv).mu for kv in read]
            blind = [fuse(nets, variables, q, jnp.zeros_like(kv)).mu for kv in read]
            pairs = [(z, teachers.logits) for z, teachers in zip(codes, copies, strict=True)]
            logits["synergy"] = over_copies([classify(nets, variables, *pair) for pair in pairs])
            logits["without_teachers"] = over_copies([classify(nets, variables, z, None) for z in blind])
            if "base" in of_fusion(nets):
                logits["base"] = over_copies([base(nets, variables, *pair) for pair in pairs])
        exists = batch["row"] < controls["size"]
        # Where the logit of a known class is not finite argmax still names a class; it counts as wrong.
        foreign = {name: ~(known(nets.student) if name == student else nets.covered) for name in logits}
        finite = {name: jnp.all(jnp.isfinite(value) | foreign[name], axis=-1) for name, value in logits.items()}
        found = {
            name: jnp.sum(exists & (jnp.argmax(value, axis=-1) == batch["label"]) & finite[name])
            for name, value in logits.items()
        }
        found |= {"examples": jnp.sum(exists), "rows": jnp.sum(jnp.where(exists, batch["row"], 0).astype(jnp.uint32))}
        found = found if axis_name is None else jax.lax.psum(found, axis_name)
        return {name: counts[name] + found[name] for name in counts}, {}

    return step


def of_fusion(nets: Networks) -> tuple[str, ...]:
    """What is counted of a fusion network: "synergy"; "base", what it is added to, alone; "without_teachers", synergy
    with kv zeroed and a uniform base: does the query bypass the teachers?"""
    if nets.ib_mbm is None:
        return ()
    return ("synergy", *(("base",) if nets.synergy_head.base != "none" else ()), "without_teachers")


@functools.lru_cache(maxsize=16)  # one compilation for all the splits of a run
def _compiled(nets: Networks, student: str, feed: Feed) -> Steps:
    return feed.compile(make_eval_step(nets, student, feed.axis_name))


class Evaluator:
    """Counts on one split again and again: what frozen networks say of it comes from its bank, where that holds it."""

    def __init__(self, nets: Networks, split: Split, feed: Feed, name: str, cache: str = ""):
        self.split, self.name = split, name
        self.bank = Bank(nets, split, feed, name=f"the {name} split", cache=cache, every_copy=True)
        self._feed, self._rows = feed, evaluation_rows(len(split.label), feed.eval_batch_size)
        # On the host: what calls get from there has one shape for every split, so that one program serves them all.
        self._labels, self._images = on_host(label=split.label), on_host(image=split.image)
        self.teacher_counts: dict[str, int] = {}  # as `correct_counts`; without teachers none
        self.teacher_logits = np.zeros((0, 0, 0), np.float32)  # [N, T, C], as the networks give them
        self.temperatures = np.ones(len(nets.teachers), np.float32)

    @property
    def count(self) -> int:
        return len(self.split.label)

    def images_of(self, classes: np.ndarray) -> int:
        """How many of the split are of these classes, [C] of bool."""
        return int(classes[self.split.label].sum())

    def read_teachers(self, variables: Variables) -> None:
        """Run the teachers, if there are any, over the split: once, and again whenever they have changed."""
        if self.bank.nets.teachers:
            (copies,) = self.bank.read("teachers", variables)
            logits = jax.device_get(over_copies([copy.logits for copy in copies]))
            if len(logits) != self.count:
                raise ValueError(
                    f"the teachers' outputs are of {len(logits)} examples; the {self.name} split has {self.count}"
                )
            self.teacher_logits = logits
            self.divide(self.temperatures)

    def divide(self, temperatures: np.ndarray) -> None:
        """Count with each teacher's logits divided by its own of these [T], from now on."""
        self.temperatures = np.asarray(temperatures, np.float32)
        if len(self.teacher_logits):
            known, labels = self.bank.nets.known, self.split.label
            self.teacher_counts = correct_counts(self.teacher_logits, known, labels, self.temperatures)

    def training_free(self, tau: float) -> dict[str, int]:
        """Correct predictions of `targets.TRAINING_FREE` at temperature `tau`, and of each teacher."""
        logits = self.teacher_logits / self.temperatures[:, None]
        found = jax.device_get(_training_free(logits, self.bank.nets.known, tau, self.split.label))
        return {name: int(count) for name, count in found.items()} | {
            name: self.teacher_counts[name] for name in self.bank.nets.teacher_names
        }

    def __call__(self, nets: Networks, variables: Variables, student: str = "student") -> dict[str, int]:
        """Correct predictions of everything `make_eval_step` counts and, of nets with teachers, of their "average".

        Raises ValueError unless every example of the split was looked at once.
        """
        variables = devices.share(variables, self._feed.devices)
        zeros = {name: np.int32(0) for name in (student, *of_fusion(nets), "examples")} | {"rows": np.uint32(0)}
        counts = devices.replicate(zeros, self._feed.devices)
        held = self.bank.of("student") if student == "student" else None
        parts = [self._labels, held or self._images]
        if nets.ib_mbm is not None:
            parts.append(self.bank.of("teachers"))
        step = _compiled(nets, student, self._feed)
        controls: dict[str, Any] = {"size": np.int32(self.count)}
        if nets.ib_mbm is not None:
            controls["temperatures"] = self.temperatures
        for call in self._feed.calls(step, self._rows, *parts):
            jax.block_until_ready(counts)  # of the call before, while this one's images were on their way
            counts, _ = step.run(counts, variables, controls, call, {})
        totals = {name: int(count) for name, count in jax.device_get(counts).items()}
        examples, rows = totals.pop("examples"), totals.pop("rows")
        if (examples, rows) != (self.count, self.count * (self.count - 1) // 2 % 2**32):
            raise ValueError(
                f"{examples} examples of the {self.name} split were counted, not all of its {self.count} once each"
            )
        return totals | ({"average": self.teacher_counts["average"]} if nets.teachers else {})

    def logits(self, variables: Variables) -> np.ndarray:
        """What the student says of every image of the split, [N, C]."""
        (outputs,) = self.bank.read("student", variables)
        self.bank.forget("student")
        return outputs.logit

    def accuracies(self, nets: Networks, variables: Variables, student: str = "student") -> dict[str, float]:
        """The same as shares of the split, of the student's of the images whose classes it knows."""
        sizes = {student: self.images_of(known(nets.student))}
        return {name: count / sizes.get(name, self.count) for name, count in self(nets, variables, student).items()}


def over_copies(logits: Sequence[jax.Array]) -> jax.Array:
    """What the copies of a network say together, [..., C] of each: the mean of their log-probabilities (SPEC 13); of
    one copy its logits themselves."""
    if len(logits) == 1:
        return logits[0]
    return jnp.mean(jnp.stack([jax.nn.log_softmax(own) for own in logits]), axis=0)


# Compiled as one: operation by operation a host compiles dozens of programs for each split.
@jax.jit
def _training_free(logits: jax.Array, known: jax.Array, tau: float, labels: jax.Array) -> dict[str, jax.Array]:
    counts = {}
    for name in targets.TRAINING_FREE:
        target = targets.KD_TARGETS[name](logits, known, tau, 0, labels, jnp.zeros(()))
        sound = (target < jnp.inf).all(axis=-1)  # -inf is of a class that no teacher with a weight knows
        counts[name] = jnp.sum(sound & (target.argmax(axis=-1) == labels))
    return counts


_average = jax.jit(targets.average)
_disagree = jax.jit(losses.DISAGREE_MODES["pred"])


def correct_counts(
    logits: np.ndarray, known: np.ndarray, labels: np.ndarray, temperatures: np.ndarray
) -> dict[str, int]:
    """Of teachers' logits [N, T, C], of which known [T, C] are meant: correct predictions of every teacher, "teacher1"
    ..., and of the average of these, each divided by its own of the temperatures [T], "average"; and the images on
    which two predict different classes that both know, "disagreement"."""
    named = predictions(logits, known, temperatures)
    counts = {name: int((found == labels).sum()) for name, found in named.items()}
    theirs = np.stack([found for name, found in named.items() if name != "average"], axis=1)  # [N, T]
    none_is_known = np.pad(known, ((0, 0), (0, 1)), constant_values=True)  # to all: -1, of a teacher that is not finite
    disagree = _disagree(theirs, labels, none_is_known)
    counts["disagreement"] = int(disagree.sum())
    return counts


def predictions(logits: np.ndarray, known: np.ndarray, temperatures: np.ndarray) -> dict[str, np.ndarray]:
    """The class that each teacher, "teacher1" ..., and their "average" name of each image, [N]; -1 is none."""
    theirs = _predictions(logits, known)
    average = np.asarray(_average(logits / temperatures[:, None], known))
    found = {f"teacher{k}": theirs[:, k - 1] for k in range(1, logits.shape[1] + 1)}
    return found | {"average": _predictions(average, np.any(known, axis=0))}


def _predictions(logits: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The known class of each row of logits [..., C]; -1, which is none, where one of a known class is not finite."""
    finite = (np.isfinite(logits) | ~known).all(axis=-1)
    return np.where(finite, np.where(known, logits, -np.inf).argmax(axis=-1), -1)
