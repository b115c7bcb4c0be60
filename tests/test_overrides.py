"""What was set beside a configuration, as text and as digits that tell runs apart."""

import dataclasses
import hashlib

import pytest

from asib_jax import recipe as recipes
from asib_jax.recipe import overrides
from configs import l2_cccp

RECIPE = recipes.read(l2_cccp.get_config("digits"))


@pytest.mark.parametrize(
    "values, expected",
    [
        ({}, ""),
        ({"seed": 3, "results_dir": "elsewhere", "exp_id": "mine", "resume": "latest"}, ""),
        ({"tau": 2.0, "kd_alpha": 0.5}, "kd_alpha=0.5 tau=2.0"),
        ({"tau_schedule": (2.0, 8.0), "teacher_lr": None}, "tau_schedule=(2.0,8.0) teacher_lr=None"),
        ({"wandb": "two words", "teacher_cache": ""}, "teacher_cache='' wandb='two words'"),
    ],
)
def test_sorted_and_compact_without_what_says_where_a_run_is(values, expected):
    recipe = dataclasses.replace(RECIPE, **values)
    assert overrides.text(recipe, values) == overrides.text(recipe, [*values][::-1]) == expected


def test_groups_are_named_in_full():
    changed = ["teacher1.name", "model.student.name", "dataset.train_subset"]
    assert overrides.text(RECIPE, changed) == (
        f"dataset.train_subset={RECIPE.dataset.train_subset} model.student.name={RECIPE.model.student.name} "
        f"teacher1.name={RECIPE.teachers[0].name}"
    )


def test_the_digest_is_of_the_text_and_none_where_nothing_was_set():
    assert overrides.digest("") == ""
    assert overrides.digest("tau=2.0") == hashlib.sha256(b"tau=2.0").hexdigest()[:4] != overrides.digest("tau=2.5")
