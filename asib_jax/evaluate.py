"""Correct predictions of the student and the synergy ensemble on a split, every example counted once (SPEC 7)."""
import collections
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from asib_jax import feature_bank, parallel
from asib_jax.data.batches import evaluation_batches
from asib_jax.data.sources import Split
from asib_jax.models.ensemble import (EVALUATION, Networks, Variables, classify, fuse, keys_and_values, query,
                                      run_network)


def make_eval_step(nets: Networks, axis_name: str | None = None) -> Callable[[Variables, dict], dict]:
    """`step(variables, batch) -> counts` of correct predictions over the batch's mask: "student" and, with a fusion
    network, "synergy" and "without_teachers" (the same with kv zeroed: does the query bypass the teachers?)."""
    def step(variables: Variables, batch: dict) -> dict:
        student, _ = run_network(nets.student, variables.of("student"), batch["image"], EVALUATION)
        logits = {"student": student.logit}
        if nets.ib_mbm is not None:
            q, kv = query(nets, student), keys_and_values(nets, variables, batch["teachers"].feats)
            logits["synergy"] = classify(nets, variables, fuse(nets, variables, q, kv).mu)
            logits["without_teachers"] = classify(nets, variables, fuse(nets, variables, q, jnp.zeros_like(kv)).mu)
        # Where a logit is not finite argmax still names a class; it counts as wrong.
        counts = {name: jnp.sum(batch["mask"] * (jnp.argmax(value, axis=-1) == batch["label"])
                                * jnp.all(jnp.isfinite(value), axis=-1)) for name, value in logits.items()}
        return counts if axis_name is None else jax.lax.psum(counts, axis_name)
    return step


@functools.lru_cache(maxsize=8)  # one compilation for all the splits of a run
def _compiled(nets: Networks, devices: tuple[jax.Device, ...]) -> Callable[[Variables, dict], dict]:
    return parallel.compile_step(make_eval_step(nets, parallel.axis_name(devices)), devices, arguments=2)


class Evaluator:
    """Evaluates one split again and again: the teachers' outputs on it are computed once, the step is compiled once."""

    def __init__(self, nets: Networks, variables: Variables, split: Split, *, name: str, batch_size: int,
                 devices: list[jax.Device], cache: str = ""):
        self.split, self.name = split, name
        self._nets, self._batch_size, self._devices, self._cache = nets, batch_size, devices, cache
        self._step = _compiled(nets, tuple(devices))
        self.bank, self._teacher_counts = None, {}
        self.read_teachers(variables)

    def student_only(self) -> "Evaluator":
        """An evaluator of the same split for the student's classifier alone, which needs no adapter and no teachers."""
        nets = Networks(self._nets.student.clone(adapter_dim=0))
        return Evaluator(nets, Variables({}, {}), self.split, name=self.name, batch_size=self._batch_size,
                         devices=self._devices)

    @property
    def count(self) -> int:
        return len(self.split.label)

    def read_teachers(self, variables: Variables) -> None:
        """Run the teachers over the split: once, and again whenever they have changed."""
        if self._nets.teachers:
            self.bank = feature_bank.build(
                self._nets, variables, self.split, keys=[jax.random.key(0)], data_aug=0, batch_size=self._batch_size,
                devices=self._devices, cache=self._cache, title=f"the {self.name} split")
            self._teacher_counts = feature_bank.correct_counts(self.bank, self.split.label)

    def teacher_counts(self) -> dict[str, int]:
        """As `feature_bank.correct_counts`; empty without teachers."""
        return dict(self._teacher_counts)

    def __call__(self, variables: Variables) -> dict[str, int]:
        """Correct predictions of everything `make_eval_step` counts and, with teachers, of their "average"."""
        totals: collections.Counter = collections.Counter()
        for batch in evaluation_batches(self.split, self._batch_size):
            if self.bank is not None:
                batch["teachers"] = self.bank.outputs(0, batch["row"])
            counts = jax.device_get(self._step(variables, parallel.shard(batch, self._devices)))
            totals.update({name: int(count) for name, count in counts.items()})
        return dict(totals) | ({"average": self._teacher_counts["average"]} if self.bank else {})

    def accuracies(self, variables: Variables) -> dict[str, float]:
        """The same as shares of the split."""
        return {name: count / self.count for name, count in self(variables).items()}
