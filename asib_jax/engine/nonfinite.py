"""Steps that were skipped because their loss or gradient is not finite: counted, and an error where they do not end."""

import collections
import dataclasses
from collections.abc import Mapping

import numpy as np

from asib_jax.objectives.state import skipped_by_scale
from asib_jax.objectives.step import TERMS

_MEND = (
    "Lower the learning rate, set grad_clip_norm, use amp_dtype='bfloat16' in place of float16, or look at the weights "
    "of the loss and at the data"
)


@dataclasses.dataclass
class Watch:
    """Watches the steps of a run, whatever phase they are of, for those that changed nothing.

    in_a_row: how many the last steps seen were; began, broken: the first of these, in words, and what was not finite
    then. skipped: how many there were in all, by phase. A snapshot holds it.
    """

    in_a_row: int = 0
    began: str = ""
    broken: str = ""
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def see(self, metrics: Mapping[str, np.ndarray], first_step: int, phase: str, epoch: int, limit: int) -> None:
        """Look at the metrics, [steps] each, of steps in order from `first_step`, of an epoch (from 0) of a phase.

        limit: how many in a row are an error. A float16 loss scale skips steps, too: up to 17 in a row from its start.
        Raises FloatingPointError, naming the step that the streak began with and the terms that were not finite in it.
        """
        where = f"{phase}, epoch {epoch + 1}"
        for i, skipped in enumerate(metrics.get("skipped", ())):
            if not skipped:
                self.in_a_row = 0
                continue
            if not self.in_a_row:
                self.began = f"step {first_step + i} of {where}"
                self.broken = broken_terms({name: values[i] for name, values in metrics.items()})
            self.in_a_row += 1
            self.skipped[phase] += 1
            if self.in_a_row >= limit:
                raise FloatingPointError(
                    f"{where}: {self.in_a_row} steps in a row from {self.began} are not finite and were skipped; the "
                    f"first one broke in {self.broken}. {_MEND}; max_nonfinite_steps says how many in a row are allowed"
                )

    def judge(self, phase: str, steps: int, compute_dtype: str) -> None:
        """Raise FloatingPointError where of a phase's steps more than a tenth, beside those that a float16 loss scale
        may skip, or all were skipped."""
        skipped = self.skipped[phase]
        if skipped > steps / 10 + skipped_by_scale(compute_dtype, steps) or skipped >= steps > 0:
            raise FloatingPointError(
                f"{phase}: {skipped} of {steps} steps are not finite and were skipped, more than a tenth; "
                f"{self.began} broke in {self.broken}. {_MEND}"
            )


def broken_terms(metrics: Mapping[str, float]) -> str:
    """The terms of a step's loss that are not finite, in the order in which it adds them up."""
    broken = {name for name, value in metrics.items() if not np.isfinite(value)}
    terms = [name for name in TERMS if name in broken] or sorted(broken)
    return ", ".join(terms) or "the gradient"
