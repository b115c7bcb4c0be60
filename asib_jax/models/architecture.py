"""What a backbone is: an ordered list of named stages, PyTorch's names, and what lies before the classifier."""
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn

# From our module's path to PyTorch's name for it: pairs of a regular expression of the whole path and a template for
# `Match.expand`, or a function of the match. The first that matches counts.
Names = tuple[tuple[str, str | Callable], ...]

Stage = tuple[str, Callable[..., nn.Module]]  # name, factory


class Architecture(NamedTuple):
    """A backbone as data. The order of `stages` is the declaration that partial freezing works by (SPEC 6).

    stages: `factory(name=..., dtype=..., axis_name=...)` gives a module whose
        `__call__(x, *, train, dropout_keys)` maps [B, h, w, c] to the next stage's input. train: BatchNorm uses and
        updates batch statistics; dropout_keys: [B] keys, one per example, or None for no dropout of any kind.
    feat_dim: F, the number of channels the last stage gives.
    names: naming conventions of PyTorch weights that fit, most common first; export writes the first.
    pooled_norm: a factory (name=...) of the float32 normalisation between pooling and `feat_2d`; None: there is none.
    dropout: rate before the classifier.
    """

    stages: tuple[Stage, ...]
    feat_dim: int
    names: tuple[Names, ...] = ()
    pooled_norm: Callable[..., nn.Module] | None = None
    dropout: float = 0.0
