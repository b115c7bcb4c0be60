"""Every key of an ASIB run with its default: the full-scale setting of the ablation ladder.

Keys are declared and described in `asib_jax/recipe/`; docs/configuration.md lists them. An experiment is a short diff
of this configuration, e.g. `configs/l1_ib.py`; what a profile (`:digits`, `:small`; at full scale the teachers'
weights) changes stands in `configs/profiles.py`.
"""

from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict, config_dict

from asib_jax.recipe import Recipe, keys
from configs import profiles


def get_config(profile: str = "") -> ConfigDict:
    """The defaults under `profile` ("", "small", "digits" or "own"), locked: an unknown key is an error."""
    config = defaults()
    profiles.apply(config, profile)
    return config.lock()


def defaults() -> ConfigDict:
    """Every key, before any profile."""
    values = {
        name: config_dict.placeholder(float) if value is None else value  # what may be empty is a number
        for name, value in keys.flat(Recipe()).items()
    }
    return ConfigDict(unflatten_dict(values, sep="."))
