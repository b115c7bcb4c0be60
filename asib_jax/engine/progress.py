"""How far a run has come: all that its schedules and choices depend on, as a snapshot holds it."""

import collections
import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from asib_jax.engine.nonfinite import Watch
from asib_jax.models.ensemble import Variables


@dataclasses.dataclass
class Tally:
    """What the steps of an epoch have come to so far. totals: sums over the steps that were not skipped; lr: the rate
    of the last step."""

    steps: int = 0
    totals: dict[str, float] = dataclasses.field(default_factory=dict)
    lr: float = 0.0

    def add(self, metrics: Mapping[str, np.ndarray]) -> None:
        """Add the metrics [steps] of a call; where a step was skipped some are not finite."""
        done = metrics["skipped"] == 0
        for name, values in metrics.items():
            if name != "lr":
                summed = values if name == "skipped" else values[done]
                self.totals[name] = self.totals.get(name, 0.0) + float(np.sum(summed, dtype=np.float64))
        self.steps, self.lr = self.steps + len(done), float(metrics["lr"][-1])

    @property
    def means(self) -> dict[str, float]:
        """Of every metric over the steps that were not skipped, NaN if all were; "skipped" is how many were."""
        done = self.steps - self.totals["skipped"]
        return {
            name: total if name == "skipped" else total / done if done else float("nan")
            for name, total in self.totals.items()
        } | {"lr": self.lr}


Held = dict[str, Any]  # {"params": {network: leaves}, "batch_stats": ..., perhaps "opt_state"}, on the host


BEFORE = "before its first epoch"  # when the best state was there already


@dataclasses.dataclass
class Best:
    """The best state on validation so far; when, in words; and for how many epochs none was better by a margin.

    began: the score of the state before the first epoch, where that competed; latest: of the last epoch.
    """

    score: float = -1.0
    when: str = ""
    held: Held | None = None
    began: float | None = None
    latest: float = -1.0
    mark: float = -1.0  # the last score that was better by more than the margin
    waited: int = 0  # epochs since

    def see(self, score: float, when: str, margin: float = 0.0) -> bool:
        """Take note of an epoch's score; whether it is the best, so that its state is to be held."""
        self.latest = score
        better = score > self.score
        if better:
            self.score, self.when = score, when
        self.mark, self.waited = (score, 0) if score > self.mark + margin else (self.mark, self.waited + 1)
        return better


@dataclasses.dataclass
class Progress:
    """Counts go by optimizer ("teacher1", "a", "b", "control/b"), whose position is never rewound; best states by what
    they are the best of: a phase's name, or "student" and "control" over all stages."""

    steps: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    epochs: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    ib_epochs: int = 0  # A-epochs with the bottleneck active: the n of SPEC 3's beta
    synergy_acc: float | None = None  # `last_synergy_acc`, an exponential average; None before any measurement
    temperatures: list[float] = dataclasses.field(default_factory=list)  # of the teachers, once they are ready
    distilled_steps: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)  # by target used
    opt_states: dict[str, Any] = dataclasses.field(default_factory=dict)  # moments that go on in the next stage
    best: dict[str, Best] = dataclasses.field(default_factory=dict)
    last: dict[str, Held] = dataclasses.field(default_factory=dict)  # at the end of the stage before
    watch: Watch = dataclasses.field(default_factory=Watch)  # for steps that are not finite

    def measured_synergy(self, accuracy: float, alpha: float) -> None:
        """`last_synergy_acc` becomes alpha*accuracy + (1-alpha)*old, the first taken whole (SPEC 4)."""
        old = self.synergy_acc
        self.synergy_acc = accuracy if old is None else alpha * accuracy + (1 - alpha) * old

    def gate(self, threshold: float) -> bool:
        """Whether synergy has been measured and is good enough to distil from (SPEC 4 and 5)."""
        return self.synergy_acc is not None and self.synergy_acc >= threshold

    def content(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """All of it for a snapshot: its arrays, by name, and its plain values."""
        arrays = {
            "opt_states": self.opt_states,
            "last": self.last,
            "best": {name: best.held for name, best in self.best.items()},
        }
        values = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in arrays
        }
        bests = {name: {**vars(best), "held": None} for name, best in self.best.items()}
        return arrays, {**values, "best": bests, "watch": vars(self.watch)}

    @classmethod
    def restored(cls, arrays: Mapping[str, Any], values: Mapping[str, Any]) -> "Progress":
        """What `content` told, read back from a snapshot, which holds no empty dicts."""
        counters = {
            name: collections.Counter(values[name])
            for name, hint in typing.get_type_hints(cls).items()
            if typing.get_origin(hint) is collections.Counter
        }
        held = arrays.get("best", {})
        bests = {name: Best(**{**best, "held": held.get(name)}) for name, best in values["best"].items()}
        watch = Watch(**{**values["watch"], "skipped": collections.Counter(values["watch"]["skipped"])})
        return cls(
            **{**values, **counters, "best": bests, "watch": watch},
            opt_states=arrays.get("opt_states", {}),
            last=arrays.get("last", {}),
        )


def overlay(variables: Variables, held: Mapping[str, Any]) -> Variables:
    """The variables with the leaves of a `Held` in their place."""

    def laid(tree, part):
        flat = flatten_dict(tree, keep_empty_nodes=True) | flatten_dict(part)
        return unflatten_dict(flat)

    return Variables(laid(variables.params, held["params"]), laid(variables.batch_stats, held.get("batch_stats", {})))


def of_network(held: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One network's variables of a `Held`: {"params", "batch_stats"}; a network without BatchNorm has no statistics."""
    return {"params": held["params"][name], "batch_stats": held.get("batch_stats", {}).get(name, {})}
