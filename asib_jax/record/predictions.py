"""What logits on a split say: probabilities, confusions of classes, the top-5 classes, the worst mistakes."""

import numpy as np

TOP = 5
TOP_FROM = 20  # classes from which the top-5 accuracy says something


def printable(name: str) -> str:
    """A name as one line as it is: newlines, escapes and what turns the direction of writing are spelled."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in name)


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax of logits [N, C]; where one is not finite NaN, as no class was predicted."""
    finite = np.isfinite(logits).all(axis=1, keepdims=True)
    safe = np.where(finite, logits, 0.0).astype(np.float64)
    powers = np.exp(safe - safe.max(axis=1, keepdims=True))
    return np.where(finite, powers / powers.sum(axis=1, keepdims=True), np.nan)


def confusion(labels: np.ndarray, guesses: np.ndarray) -> np.ndarray:
    """[C, C] images by their class (rows) and the one that is most probable in guesses [N, C]."""
    told, classes = ~np.isnan(guesses[:, 0]), guesses.shape[1]
    cells = labels[told] * classes + guesses[told].argmax(axis=1)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def top_correct(labels: np.ndarray, guesses: np.ndarray, top: int = TOP) -> np.ndarray:
    """Whether each label [N] is among the `top` most probable of guesses [N, C]; of equal ones the first count."""
    own, classes = np.take_along_axis(guesses, labels[:, None], axis=1), np.arange(guesses.shape[1])
    before = (guesses > own) | ((guesses == own) & (classes < labels[:, None]))
    return (before.sum(axis=1) < top) & ~np.isnan(own[:, 0])


def worst_mistakes(labels: np.ndarray, guesses: np.ndarray, most: int) -> np.ndarray:
    """The rows of guesses [N, C] that are wrong with the highest probability, the worst first."""
    told = np.nan_to_num(guesses, nan=-1.0)
    wrong = np.flatnonzero((told.argmax(axis=1) != labels) & (told[:, 0] >= 0))
    return wrong[np.argsort(-told[wrong].max(axis=1), kind="stable")[:most]]
