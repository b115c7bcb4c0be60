"""Everything that is trained is a phase: some epochs of one step over one split. A run is a list of them, in order.

`teachers.py`, `a_step.py` and `b_step.py` describe phases, `train.py` lists them, `runner.py` runs them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from asib_jax.context import Context
from asib_jax.engine.banks import View
from asib_jax.engine.progress import Progress
from asib_jax.models.ensemble import Networks, Variables
from asib_jax.objectives.step import Training


@dataclasses.dataclass(frozen=True)
class Phase:
    """Some epochs of one training step.

    What it is. name: for snapshots and metrics, "teacher1", "stage1/a", "control/stage1/b"; title: for a person.
    What it trains. network: the variables that `nets.student` has; training: loss, mask, statistics, directions;
    optimizer: whose steps, rate and moments go on over phases; rate: of a step of that optimizer; controls: of an
    epoch, arrays that are constant over it.
    What it reads. split: a field of `Data`; rows: those of it that it trains on, None: all; order: of an epoch; views:
    the augmentation of each epoch; reads: whose outputs it takes from a bank where that holds the epoch's view, of
    "teachers" and "student"; runs_networks: why it takes none.
    What is measured and chosen. score: what of the validation accuracies names the best state, "" for no measurement;
    best: under which name it is kept; chosen: the leaves that are kept and restored as one, None for those that train;
    holds_moments: these, too; restore: whether the phase ends with them; watch: measure before the first epoch, too;
    incoming: whether that state competes; patience, margin: epochs without a score better by a margin that end it.
    What follows. counts: told controls and steps after an epoch; finish: after the last; snapshot_at_end: where finish
    leaves more than arrays on disk, which a run that goes on must not find early.
    """

    name: str
    title: str
    epochs: int
    network: str
    nets: Networks
    training: Training
    optimizer: str
    rate: Callable[[int], float]
    controls: Callable[[Progress, int], dict[str, Any]]
    split: str
    order: Callable[[int], np.random.Generator]
    rows: np.ndarray | None = None
    views: tuple[View, ...] = ()
    reads: frozenset[str] = frozenset()
    runs_networks: str = ""
    score: str = ""
    best: str = ""
    chosen: Mapping[str, Any] | None = None
    holds_moments: bool = False
    restore: bool = True
    watch: bool = False
    incoming: bool = False
    patience: int = 0
    margin: float = 0.0
    counts: Callable[[Progress, dict[str, Any], int], None] = lambda progress, controls, steps: None
    finish: Callable[[Context, Variables, Progress], Variables] = lambda context, variables, progress: variables
    snapshot_at_end: bool = False

    def images(self, split: int) -> int:
        """How many it trains on, of so many in its split."""
        return split if self.rows is None else len(self.rows)

    @property
    def uses(self) -> tuple[str, ...]:
        """The networks whose variables its step takes."""
        fusion = ("ib_mbm", "synergy_head") if self.nets.ib_mbm is not None else ()
        return (self.network, *self.nets.teacher_names, *fusion)

    @property
    def changes_teachers(self) -> bool:
        """Whether it trains networks that other phases read."""
        return not set(self.nets.teacher_names).isdisjoint(self.training.trained_stats)
