"""The launch scripts: done in this process, which has jax already, or in one of their own."""

import contextlib
import io
import os
import pathlib
import runpy
import subprocess
import sys
from typing import TextIO
from unittest import mock

import jax
from absl import app, flags
from absl.testing import flagsaver

import asib_jax.tools.command_line  # noqa: F401, for it defines a flag for all scripts
from asib_jax.record.console import leave

ROOT = pathlib.Path(__file__).resolve().parents[1]
app.define_help_flags()  # as the first script would, once


def launch(script: str | pathlib.Path, *arguments: str, console: TextIO | None = None) -> subprocess.CompletedProcess:
    """The end of `python launch/SCRIPT.py ARGUMENTS` in ROOT, done in this process with its devices.

    console: what stands for stderr, whose text the result lacks then.

    The script's flags are defined and read anew and then forgotten, as are its settings of jax and of the log.
    """
    command, settings = [str(ROOT / "launch" / f"{script}.py"), *arguments], dict(jax.config.values)
    out, errors, status = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(console or errors),
        flagsaver.flagsaver(),
        mock.patch.object(sys, "argv", command),
        mock.patch.object(sys, "path", [*sys.path]),
    ):
        flags.FLAGS.unparse_flags()
        sys.modules.pop("config_config", None)  # the file of configuration of the script before
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        finally:
            for name, value in settings.items():
                if jax.config.values[name] != value:
                    jax.config.update(name, value)
            leave()
    return subprocess.CompletedProcess(command, status, out.getvalue(), errors.getvalue())


def launch_process(
    script: str | pathlib.Path,
    *arguments: str,
    shell: tuple[str, ...] = (),
    cwd: pathlib.Path = ROOT,
    **environment: str,
) -> subprocess.CompletedProcess:
    """The same in a process with a device of its own, started by the command `shell` if one is given."""
    return subprocess.run(
        [*shell, sys.executable, str(ROOT / "launch" / f"{script}.py"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    )
