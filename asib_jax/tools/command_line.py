"""What the launch scripts share: how flags are read, how an error is told, and the exit status that says what it was.

0: finished; 2: something that the user can mend (a flag, a key, a file, a machine); 1: a mistake of ours, or a run that
broke down; 75: a run that was stopped by a signal and can go on; 130: stopped before it began.
"""

import contextlib
import functools
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import TextIO, cast

from absl import app, flags, logging

from asib_jax import shipped
from asib_jax.engine import hosts
from asib_jax.errors import UserError
from asib_jax.record import console
from asib_jax.record.signals import EXIT_INTERRUPTED, Interrupted
from asib_jax.tools import usage

_ALONE = {"config": "configs/l2_cccp.py:digits", "run": "results/latest"}  # flags that need no name, and examples

_VERBOSE = flags.DEFINE_boolean("verbose", False, "Show where in the code an error came up.")


def run(main: Callable[..., None], arguments: bool = False) -> None:
    """Read the flags, do `main` and leave the process with a status from above, its error told on stderr.

    arguments: whether `main` takes, as a list, what stands on the command line beside flags; else that is an error.
    """

    def quietly(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # jax tells of each backend it has not, orbax of every step it takes
        console.listen(logging.WARNING)  # of ours
        try:
            os.getcwd()
        except FileNotFoundError as error:  # libraries would end the process for it
            raise UserError("the folder that this was started in is gone: start it in one that exists") from error
        main(*([argv[1:]] if arguments else []))
        out.flush()
        if out.failed and not isinstance(out.failed, BrokenPipeError):  # who closed the pipe had read enough
            raise UserError(f"what was to be printed is lost: {out.failed}")

    _open_descriptors()
    out = console.Lasting(sys.stdout)
    sys.stdout, sys.stderr = cast(TextIO, out), console.lasting(sys.stderr)
    try:
        app.run(quietly, flags_parser=functools.partial(_parse, arguments=arguments))
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(tell(error))


def _open_descriptors() -> None:
    """Those of stdin, stdout and stderr that were closed, in whose place a file of the run would be opened else."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free, which is this one


def tell(error: BaseException) -> int:
    """Print what went wrong in a message of its own, and its notes; the traceback only with --verbose. The exit status.

    A SystemExit is an end that its status says: nothing is printed.
    """
    if isinstance(error, SystemExit):
        return int(error.code or 0)
    if _VERBOSE.value if flags.FLAGS.is_parsed() else "--verbose" in sys.argv:
        traceback.print_exception(error)
    if isinstance(error, Interrupted):
        print(f"stopped {error}", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    if isinstance(error, KeyboardInterrupt):
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        return 130
    notes = getattr(error, "__notes__", [])
    if isinstance(error, UserError | OSError):
        status, message = 2, str(error)
    else:
        status, message = 1, f"{type(error).__name__}: {error}"
        notes = notes or ["start it again with --verbose to see where in the code"]
    print("\n  ".join([console.marked("error", message), *notes]), file=sys.stderr, flush=True)
    return status


def host_flags() -> Callable[[], contextlib.AbstractContextManager]:
    """Define the flags by which processes on several hosts meet; what is returned joins them, see `hosts.joined`."""
    coordinator = flags.DEFINE_string("coordinator", None, "Of several hosts: HOST:PORT of process 0, or auto.")
    processes = flags.DEFINE_integer("processes", None, "How many there are; not with auto, which finds it.")
    process = flags.DEFINE_integer("process", None, "Which one this is, from 0; not with auto.")
    return lambda: hosts.joined(coordinator.value, processes.value, process.value, tell)


def _parse(argv: list[str], arguments: bool) -> list[str]:
    """What is there beside flags. UserError for whatever the command line, or a file of configuration, does wrong."""
    usage.answer(argv)
    argv = [f"--config={shipped.path(arg[9:])}" if arg.startswith("--config=") else arg for arg in _named(argv)]
    sys.argv = argv  # where ml_collections looks for overrides, and asks that --config is before them
    try:
        others = flags.FLAGS(argv)[1:]
        if "config" in flags.FLAGS:
            _ = flags.FLAGS["config"].value.items  # one that was not found fails when it is asked for anything
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and not _in_config(error):  # --help ends so
            raise
        raise UserError(_explained(error, argv)) from error
    if others and not arguments:
        already = "".join(f": --{name} is given already" for name in _ALONE if name in flags.FLAGS)
        raise UserError(
            f"unexpected arguments {others}{already}; flags are written --FLAG=VALUE, overrides --config.KEY=VALUE"
        )
    return [argv[0], *others]


def _named(argv: list[str]) -> list[str]:
    """The same, --config=VALUE or --run=VALUE first; without such a flag it is the first argument that is none, nor the
    value of one."""

    def takes_next(argument: str) -> bool:
        name = argument.lstrip("-")
        known = [flags.FLAGS[flag].boolean for flag in (name, name.removeprefix("no")) if flag in flags.FLAGS]
        return argument.startswith("-") and argument != "--" and "=" not in argument and not any(known)

    end = argv.index("--") if "--" in argv else len(argv)  # of what may be flags
    for name in [name for name in _ALONE if name in flags.FLAGS]:
        place, *again = [k for k in range(1, end) if re.match(f"--?{name}(=|$)", argv[k])] or [0]
        if again:
            raise UserError(f"--{name} is given twice")
        if place:
            taken = 1 if "=" in argv[place] else 2
            if place + taken > end:
                return argv  # it lacks a value, which will be told
            value = argv[place].partition("=")[2] if taken == 1 else argv[place + 1]
        else:
            alone = (k for k in range(1, end) if not argv[k].startswith("-") and not takes_next(argv[k - 1]))
            place, taken = next(alone, end + 1), 1
            if place >= len(argv):
                return argv
            value = argv[place]
        if not value:
            raise UserError(_missing(name))
        return [argv[0], f"--{name}={value}", *argv[1:place], *argv[place + taken :]]
    return argv


def _missing(name: str) -> str:
    return f"--{name} is missing: name a {name}, as {_ALONE[name]}"


def _explained(error: BaseException, argv: list[str]) -> str:
    """What absl or ml_collections makes of it, or Python of a configuration: the cause may lie several errors deep."""
    chain = [error]
    while deeper := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(deeper)
    file = next((argument for argument in argv if argument.startswith("--config=")), "--config=")
    if file.endswith(".json"):
        return (
            f"{file}: a config is a .py file; to go on with the run in a folder RUN, give the one that it was "
            "started with, and --config.resume=RUN"
        )
    if group := re.match(r"flag --config\.([\w.]+)=.* as a ConfigDict", _line(error)):
        key = f"{group[1]}." + {"schedule": "type", "model": "student.name"}.get(group[1], "name")
        return f"{file}: {group[1]} is a group of keys; set {key}, or another of them"
    if file != "--config=" and _line(error).startswith("flag --config=None:"):
        return f"{file}: its get_config returned None; it has to return the config"
    if missing := re.match(r"flag --(config|run)=None:|Unknown command line flag '(?:no)?(config)\.", _line(error)):
        return _missing(missing[1] or missing[2])
    if other := re.match(r"'(\w+)' object has no attribute 'items'", _line(error)):
        return f"{file}: its get_config returned a value of type {other[1]}; it has to return the config"
    for one in chain:
        if place := _in_config(one):
            return f"{file}: {type(one).__name__}: {_line(getattr(one, 'msg', one))} ({place})"
    if "has no attribute 'get_config'" in _line(error):
        return f"{file}: it has no get_config(profile), which has to return the config, as those in configs/ have"
    if "Error whilst parsing config file" in _line(error):
        return f"{file}: {_line(chain[-1])}; the config is what get_config(profile) returns"
    for one in chain:
        if isinstance(one, KeyError):  # its text names the nearest key, where one is near
            if teacher := re.match(r"'(teacher\d+)'", _line(one)):
                return (
                    f"unknown key in {file}: {teacher[0]}; teachers are added in a config file: with "
                    f"config.unlocked(): config.{teacher[1]} = ConfigDict(config.teacher1)"
                )
            return f"unknown key in {file}: {_line(one)}"
    if isinstance(error, OSError):
        told = _line(str(error).splitlines()[-1]).rstrip(".")
        return f"{file}: {told}{_instead(file.removeprefix('--config='))}"
    return f"{file}: {_line(error)}" if isinstance(error, AttributeError | TypeError | SyntaxError) else _line(error)


def _instead(config: str) -> str:
    """What may be meant by a configuration that is not there."""
    path, *after = config.split(":")
    if any(os.path.exists(":".join([path, *after[:end]])) for end in range(1, len(after) + 1)):
        return "; what follows the first colon is the profile: call the file, and its folders, something without one"
    return "" if "/" in path or os.path.exists(path) else f"; there are {', '.join(shipped.names())}, or a path"


def _in_config(error: BaseException) -> str:
    """File and line of the configuration in which it was raised; "": it was in none."""
    if isinstance(error, SyntaxError) and error.filename:  # <unknown>: a value on the command line
        return f"{error.filename}, line {error.lineno}" if error.filename != "<unknown>" else ""
    frames = traceback.extract_tb(error.__traceback__)
    loading = [i for i, frame in enumerate(frames) if frame.filename.endswith("config_flags.py")]
    inside = frames[loading[-1] :] if loading else []
    own = [frame for frame in inside if not re.search(r"^<|[/\\](absl|ml_collections)[/\\]", frame.filename)]
    return f"{own[-1].filename}, line {own[-1].lineno}" if own else ""


def _line(message: object) -> str:
    """On one line. ml_collections wraps KeyErrors, whose text is a quotation, and lists a whole configuration."""
    while isinstance(message, KeyError | AttributeError):
        message = message.args[0]
    line = " ".join(str(message).split()).removeprefix(
        "Configuration is not available because of an earlier failure to load: "
    )
    return re.sub(r'Other fields present: "{.*}" ', "", line)
