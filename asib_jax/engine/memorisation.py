"""How sure a teacher is of images that it has learnt, and of others (SPEC 13): in float64, on the host."""

import numpy as np

from asib_jax.recipe.ranges import TEMPERATURE


def answers(logits: np.ndarray, labels: np.ndarray, known: np.ndarray) -> tuple[float, np.ndarray]:
    """Of a teacher's logits [N, C] and the classes known [C] to it: its accuracy on the images of those, and their
    logits over those. A logit that is not finite makes an answer wrong, and is left out.

    Without any such image the accuracy is NaN.
    """
    own = known[labels]
    found, wanted = logits[own][:, known], labels[own]
    finite = np.isfinite(found).all(axis=-1)
    right = finite & (np.flatnonzero(known)[found.argmax(axis=-1)] == wanted)
    return float(right.mean()) if len(right) else float("nan"), found[finite]


def mean_entropy(logits: np.ndarray, temperature: float) -> float:
    """Of softmax(logits / temperature), logits [N, K], in nats; NaN of none."""
    from scipy.special import entr, softmax

    found = entr(softmax(np.asarray(logits, np.float64) / temperature, axis=-1)).sum(axis=-1)
    return float(found.mean()) if len(found) else float("nan")


def equal_temperature(train: np.ndarray, validation: np.ndarray) -> float | None:
    """The temperature at which the mean entropy of logits [N, K] on training images is that of those [M, K] on
    validation, which stay as they are; it rises with the temperature. None where no allowed one reaches it."""
    from scipy.optimize import brentq

    wanted, ends = mean_entropy(validation, 1.0), np.log([TEMPERATURE["at_least"], TEMPERATURE["at_most"]])

    def excess(log: float) -> float:
        return mean_entropy(train, np.exp(log)) - wanted

    low, high = map(excess, ends)
    return float(np.exp(brentq(excess, *ends))) if low < 0 < high else None
