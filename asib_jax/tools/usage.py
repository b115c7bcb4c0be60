"""What `--help` and `--list_keys` tell: a script's flags, and what a configuration can be made of."""

import re
import sys
import textwrap

from absl import flags

from asib_jax import shipped
from asib_jax.errors import UserError
from asib_jax.models import MODELS
from asib_jax.recipe import keys, read

LIST_KEYS = "list_keys"
_WIDTH = 100


def answer(argv: list[str]) -> None:
    """Print what the command line asks to be told instead of anything else, and leave with status 0.

    Raises UserError for a pattern that is none, or that no key has.
    """
    arguments = argv[1:]
    wanted = [place for place, argument in enumerate(arguments) if re.match(f"--?{LIST_KEYS}(=|$)", argument)]
    if {"-h", "-help", "--help", "-?", "--?"} & {*arguments}:
        print(help_text())
    elif wanted and "config" in flags.FLAGS:
        _, given, pattern = arguments[wanted[0]].partition("=")
        after = [argument for argument in arguments[wanted[0] + 1 : wanted[0] + 2] if not argument.startswith("-")]
        print(keys_text(pattern if given else "".join(after)))
    else:
        return
    raise SystemExit(0)


def help_text() -> str:
    """Of the script that runs: its docstring, its flags and those that all scripts have, and what they take."""
    by_module = flags.FLAGS.flags_by_module_dict()
    own = {
        flag.name: flag
        for module, defined in by_module.items()
        if module == sys.argv[0] or module.startswith("asib_jax")
        for flag in defined
    }
    lines = [(sys.modules["__main__"].__doc__ or "").strip(), "", "flags:"]
    for name, flag in sorted(own.items()):
        default = f" (default: {flag.value})" if flag.value not in (None, False, "") else ""
        lines += _entry(f"--{name}", f"{flag.help}{default}")
    if "config" in own:
        lines += _entry(f"--{LIST_KEYS}=PATTERN", "Print the keys whose name or meaning matches, and stop.")
        lines += _entry("--config.KEY=VALUE", "Set a key of the configuration.")
        lines += ["", "configurations, in configs/:", *_wrapped(", ".join(shipped.names()), "  ")]
        lines += ["", "profiles, after a colon:"]
        for name, what in shipped.profiles().items():
            lines += _entry(f":{name}" if name else "none", what)
        lines += ["", "networks:", *_wrapped(", ".join(MODELS), "  ")]
    return "\n".join(lines)


def keys_text(pattern: str) -> str:
    """The keys of which name or meaning matches the regular expression, with their defaults, "" for all of them.

    Raises UserError where that is no expression, or none matches.
    """
    try:
        search = re.compile(pattern, re.IGNORECASE).search
    except re.error as error:
        raise UserError(f"--{LIST_KEYS}={pattern} is no regular expression: {error}") from error
    lines = []
    for held in keys.walk(read(shipped.config("base"))):
        if search(held.name) or search(held.key.meaning):
            acts = f"acts with {held.when.words}" if held.when.words else ""
            told = "; ".join(filter(None, (held.key.meaning, keys.values(held.key), acts)))
            lines += _entry(f"{held.name} = {held.value!r}", told.replace("`", ""))
    if not lines:
        raise UserError(f"--{LIST_KEYS}={pattern}: no key has that in its name or meaning")
    return "\n".join(lines)


def _entry(name: str, told: str) -> list[str]:
    return [f"  {name}", *_wrapped(told, "      ")]


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
