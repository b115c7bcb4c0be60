"""Whole runs that take seconds: networks of three convolutions on images of 8x8 in a file."""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
import pytest
from ml_collections import ConfigDict
from networks import convolutions, make_split

from asib_jax import recipe as recipes
from asib_jax.models import MODELS
from asib_jax.models.layers import Architecture
from asib_jax.recipe import Recipe

STEPS = 10  # of an epoch: 80 images in batches of 8
SMALL = {
    "dataset.name": "npz",
    "dataset.batch_size": 8,
    "dataset.data_aug": 0,
    "dataset.val_fraction": 0.2,
    "model.student.name": "tiny_scratch",
    "model.student.mean": (0.5071, 0.4865, 0.4409),
    "model.student.std": (0.2673, 0.2564, 0.2762),
    "teacher1.name": "tiny_teacher",
    "teacher2.name": "tiny_teacher",
    **{f"teacher{k}.{key}": value for k in (1, 2) for key, value in (("weights", ""), ("finetune_epochs", 0))},
    "distill_out_dim": 8,
    "ib_mbm_out_dim": 8,
    "ib_mbm_n_head": 2,
    "use_amp": False,
    "pictures": False,
    "num_devices": 1,
    "student_epochs_per_stage": (2, 2),
    "a_step_views": 0,
    "b_step_views": 0,
    "synergy_only_epochs": 1,
    "enable_kd_after_syn_acc": 0.22,
    "synergy_kd_alpha": 0.05,
    "a_step_lr": 1e-3,
    "student_lr": 0.01,
    "schedule.lr_warmup_epochs": 0,
}


class Plain(nn.Module):
    """A stage of one convolution, without BatchNorm."""

    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, x, *, train, dropout_keys=None):
        return nn.relu(nn.Conv(8, (3, 3), 2, dtype=self.dtype, name="conv")(x))


@contextlib.contextmanager
def tiny_networks() -> Iterator[None]:
    """The names "tiny", "tiny_teacher" and "plain_teacher" among MODELS."""
    networks = {
        "tiny": convolutions(8, 8, 8),
        "tiny_teacher": convolutions(8, 16),
        "plain_teacher": Architecture((("stage0", Plain),), 8),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, network in networks.items():
            patch.setitem(MODELS, name, lambda small_input, network=network: network)
        yield


def write_data(folder: Path) -> str:
    """The path of an .npz of 100 training images, 23 for test."""
    path = folder / "colours.npz"
    training, test = make_split(100), make_split(23, seed=1)
    np.savez(path, x_train=training.image, y_train=training.label, x_test=test.image, y_test=test.label)
    return str(path)


def read_recipe(name: str, data_file: str, **changes) -> Recipe:
    """`configs/name.py` on that file, with `SMALL` and these changes."""
    return recipes.read(read_config(name, data_file, **changes))


def read_config(name: str, data_file: str, **changes) -> ConfigDict:
    """The same as a configuration."""
    config = importlib.import_module(f"configs.{name}").get_config()
    epochs = {"teacher_adapt_epochs": min(config.teacher_adapt_epochs, 2)}  # where the config has an A-Step at all
    config.update_from_flattened_dict({"dataset.path": data_file, **SMALL, **epochs, **changes})
    return config
