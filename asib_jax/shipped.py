"""The scripts and configurations that come with the library: beside it in a checkout, within it where it is installed.

Installed they are no packages that anybody could import: `configs` and `launch` are names that others have, too.
"""

import contextlib
import pathlib
import runpy
import sys
from collections.abc import Iterator
from typing import Any

from asib_jax.errors import UserError

_PACKAGE = pathlib.Path(__file__).resolve().parent
HOME = _PACKAGE / "shipped" if (_PACKAGE / "shipped").is_dir() else _PACKAGE.parent  # of launch/ and configs/


def names() -> list[str]:
    """What configurations there are; those that others build on or fine-tune teachers are among them."""
    return sorted(path.stem for path in (HOME / "configs").glob("*.py") if "def get_config" in path.read_text())


def path(name: str) -> str:
    """The file of a shipped configuration, "l2_cccp:digits" or "l2_cccp.py:digits", with its profile; whatever else is
    named as it is."""
    given, colon, profile = name.partition(":")
    stem = given.removesuffix(".py")
    known = "/" not in stem and not pathlib.Path(given).exists() and stem in names()
    return f"{HOME / 'configs' / stem}.py{colon}{profile}" if known else name


def config(name: str) -> dict[str, Any]:
    """The configuration "l2_cccp:digits", as nested dicts.

    Raises UserError for a name that is none of `names`, or a profile that there is not.
    """
    stem, _, profile = name.partition(":")
    if stem not in names():
        raise UserError(f"config={name!r} is unknown; there are {', '.join(names())}")
    with _importable():
        try:
            return runpy.run_path(str(HOME / "configs" / f"{stem}.py"))["get_config"](profile).to_dict()
        except ValueError as error:
            raise UserError(str(error)) from error


def profiles() -> dict[str, str]:
    """What the profiles of the shipped configurations are, by name; "" is full scale."""
    with _importable():
        found = runpy.run_path(str(HOME / "configs" / "profiles.py"))["PROFILES"]
    return {name: function.__doc__ for name, function in found.items()}


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    """Within it, `configs` is ours; what the caller may have under that name comes back after."""

    def others() -> dict[str, Any]:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "configs"}

    before = others()
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(HOME))
    try:
        yield
    finally:
        sys.path.remove(str(HOME))
        for name in others():
            del sys.modules[name]
        sys.modules.update(before)
