"""Correct predictions of the student and the synergy ensemble on a split, every example counted once (SPEC 7)."""
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from asib_jax.engine import feature_bank, parallel
from asib_jax.data.batches import evaluation_rows
from asib_jax.data.sources import Split
from asib_jax.engine.feed import Feed, Steps, on_host
from asib_jax.models.ensemble import Networks, Variables, classify, fuse, keys_and_values, query, run_student


def make_eval_step(nets: Networks, axis_name: str | None = None) -> Callable:
    """`step(counts, variables, controls, batch) -> (counts, {})`: adds the batch's correct predictions.

    controls: "size", the number of examples; rows of a batch beyond it count for nothing. Counted are "student" and,
    with a fusion network, "synergy" and "without_teachers" (the same with kv zeroed: does the query bypass the
    teachers?). The student's outputs are those the batch brings, or are computed. What was looked at is counted, too:
    "examples", and the sum of their "rows" modulo 2^32.
    """
    def step(counts: dict, variables: Variables, controls: dict, batch: dict) -> tuple[dict, dict]:
        student = batch["student"] if "student" in batch else run_student(nets, variables, batch["image"])
        logits = {"student": student.logit}
        if nets.ib_mbm is not None:
            q, kv = query(nets, variables, student.feat), keys_and_values(nets, variables, batch["teachers"].feats)
            logits["synergy"] = classify(nets, variables, fuse(nets, variables, q, kv).mu)
            logits["without_teachers"] = classify(nets, variables, fuse(nets, variables, q, jnp.zeros_like(kv)).mu)
        exists = batch["row"] < controls["size"]
        # Where a logit is not finite argmax still names a class; it counts as wrong.
        found = {name: jnp.sum(exists & (jnp.argmax(value, axis=-1) == batch["label"])
                               & jnp.all(jnp.isfinite(value), axis=-1)) for name, value in logits.items()}
        found |= {"examples": jnp.sum(exists), "rows": jnp.sum(jnp.where(exists, batch["row"], 0).astype(jnp.uint32))}
        found = found if axis_name is None else jax.lax.psum(found, axis_name)
        return {name: counts[name] + found[name] for name in counts}, {}
    return step


@functools.lru_cache(maxsize=8)  # one compilation for all the splits of a run
def _compiled(nets: Networks, feed: Feed) -> Steps:
    return feed.compile(make_eval_step(nets, feed.axis_name))


class Evaluator:
    """Evaluates one split again and again: the teachers' outputs on it are computed once, the step is compiled once."""

    def __init__(self, nets: Networks, variables: Variables, split: Split, *, name: str, batch_size: int, feed: Feed,
                 cache: str = ""):
        self.split, self.name = split, name
        self._nets, self._feed, self._cache = nets, feed, cache
        self._rows = evaluation_rows(len(split.label), batch_size)
        self._step = _compiled(nets, feed)
        # On the host: what calls get from there has one shape for every split, so that one program serves them all.
        self._labels, self._images = on_host(label=split.label), on_host(image=split.image)
        self._teachers, self._student = [], None
        self.teachers, self._teacher_counts = None, {}  # the teachers' outputs, `feature_bank.View`
        self.read_teachers(variables)

    def student_only(self) -> "Evaluator":
        """An evaluator of the same split for the student's classifier alone, which needs no adapter and no teachers."""
        nets = Networks(self._nets.student.clone(adapter_dim=0))
        return Evaluator(nets, Variables({}, {}), self.split, name=self.name, batch_size=self._rows.shape[1],
                         feed=self._feed)

    @property
    def count(self) -> int:
        return len(self.split.label)

    def read_teachers(self, variables: Variables) -> None:
        """Run the teachers over the split: once, and again whenever they have changed."""
        if self._nets.teachers:
            (self.teachers,) = feature_bank.read_teachers(self._nets, variables, self.split, **self._reading(),
                                                          cache=self._cache, title=f"the {self.name} split")
            if len(self.teachers.logits) != self.count:
                raise ValueError(f"the teachers' outputs are of {len(self.teachers.logits)} examples; the {self.name} "
                                 f"split has {self.count}")
            self._teachers = [on_host(teachers=self.teachers)]
            self._teacher_counts = feature_bank.correct_counts(self.teachers, self.split.label)

    def read_student(self, variables: Variables) -> None:
        """Run the student over the split, for all evaluations until `drop_student`: it stands still."""
        (outputs,) = feature_bank.read_student(self._nets, variables, self.split, **self._reading())
        self._student = on_host(student=outputs)

    def drop_student(self) -> None:
        """Run the student in every evaluation again."""
        self._student = None

    def _reading(self) -> dict:
        return {"keys": [jax.random.key(0)], "data_aug": 0, "batch_size": self._rows.shape[1], "feed": self._feed}

    def teacher_counts(self) -> dict[str, int]:
        """As `feature_bank.correct_counts`; empty without teachers."""
        return dict(self._teacher_counts)

    def __call__(self, variables: Variables) -> dict[str, int]:
        """Correct predictions of everything `make_eval_step` counts and, with teachers, of their "average".

        Raises ValueError unless every example of the split was looked at once.
        """
        names = ["student"] + (["synergy", "without_teachers"] if self._nets.ib_mbm is not None else [])
        zeros = {name: np.int32(0) for name in (*names, "examples")} | {"rows": np.uint32(0)}
        counts = parallel.replicate(zeros, self._feed.devices)
        parts = [self._labels, *self._teachers, self._images if self._student is None else self._student]
        for call in self._feed.calls(self._step, self._rows, *parts):
            jax.block_until_ready(counts)  # of the call before, while this one's images were on their way
            counts, _ = self._step.run(counts, variables, {"size": np.int32(self.count)}, call, {})
        totals = {name: int(count) for name, count in jax.device_get(counts).items()}
        examples, rows = totals.pop("examples"), totals.pop("rows")
        if (examples, rows) != (self.count, self.count * (self.count - 1) // 2 % 2**32):
            raise ValueError(f"{examples} examples of the {self.name} split were counted, not all of its {self.count} "
                             "once each")
        return totals | ({"average": self._teacher_counts["average"]} if self._nets.teachers else {})

    def accuracies(self, variables: Variables) -> dict[str, float]:
        """The same as shares of the split."""
        return {name: count / self.count for name, count in self(variables).items()}
