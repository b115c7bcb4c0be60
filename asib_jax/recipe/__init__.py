"""The configuration as typed values: the one table of keys, and what they must satisfy."""

from asib_jax.recipe.groups import DatasetRecipe, ModelRecipe, ScheduleRecipe, StudentRecipe, TeacherRecipe
from asib_jax.recipe.reading import EARLIER, RETIRED, read, read_stored
from asib_jax.recipe.recipe import Recipe

__all__ = [
    "EARLIER",
    "RETIRED",
    "DatasetRecipe",
    "ModelRecipe",
    "Recipe",
    "ScheduleRecipe",
    "StudentRecipe",
    "TeacherRecipe",
    "read",
    "read_stored",
]
