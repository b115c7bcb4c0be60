"""Steps that were skipped because their loss or gradient is not finite: counted, and an error where they do not end."""

from collections.abc import Mapping

import numpy as np

from asib_jax.objectives.step import TERMS


class Watch:
    """Watches the steps of a training for those that changed nothing.

    limit: how many in a row are an error. A float16 loss scale skips steps, too: up to 17 in a row from its start.
    in_a_row: how many the last steps seen were; of a resumed training, given. skipped: how many there were in all.
    """

    def __init__(self, limit: int, in_a_row: int = 0):
        self.limit, self.in_a_row, self.skipped = limit, in_a_row, 0
        self._began: int | None = None  # of the present streak: its first step, and what was not finite then
        self._broken = ""

    def see(self, metrics: Mapping[str, np.ndarray], first_step: int, phase: str = "") -> None:
        """Look at the metrics, [steps] each, of steps in their order from `first_step`.

        phase: in words, what they are steps of. Raises FloatingPointError, naming the step that the streak began with
        and the terms that were not finite in it, at `limit` in a row.
        """
        for i, skipped in enumerate(metrics.get("skipped", ())):
            if not skipped:
                self.in_a_row, self._began = 0, None
                continue
            if self._began is None:
                self._began = first_step + i - self.in_a_row
                self._broken = broken_terms({name: values[i] for name, values in metrics.items()})
            self.in_a_row, self.skipped = self.in_a_row + 1, self.skipped + 1
            if self.in_a_row >= self.limit:
                raise FloatingPointError(
                    f"{phase + ': ' if phase else ''}{self.in_a_row} steps in a row from step {self._began} are not "
                    f"finite and were skipped; the first one broke in {self._broken}. Lower the learning rate, set "
                    "grad_clip_norm, use amp_dtype='bfloat16' in place of float16, or look at the data; "
                    "max_nonfinite_steps says how many in a row are allowed"
                )


def broken_terms(metrics: Mapping[str, float]) -> str:
    """The terms of a step's loss that are not finite, in the order in which it adds them up."""
    broken = {name for name, value in metrics.items() if not np.isfinite(value)}
    terms = [name for name in TERMS if name in broken] or sorted(broken)
    return ", ".join(terms) or "the gradient"
