"""The console on real terminals, full and gone, and log.txt; the exit status of what cannot be told."""

import contextlib
import json
import logging
import os
import re
import select
import subprocess
import sys
import termios

import pytest
from launching import ROOT

from asib_jax.record import console
from asib_jax.record.console import setup_logging
from asib_jax.record.reporting import Reporter

STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d"


pytestmark = pytest.mark.usefixtures("logger_after_use")


def test_log_lines_carry_time_and_level_and_move_with_the_run(tmp_path, capsys, logger_after_use):
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        logger = setup_logging(tmp_path / run)
        logger.info("epoch %d: accuracy %.3f", 3, 0.5)
        logger.warning("key tau has no effect in run %s", run)
    assert logger is logger_after_use
    for run in ("one", "two"):
        lines = (tmp_path / run / "log.txt").read_text().splitlines()
        assert re.fullmatch(STAMP + " INFO epoch 3: accuracy 0.500", lines[0])
        assert re.fullmatch(f"{STAMP} WARNING key tau has no effect in run {run}", lines[1])
        assert len(lines) == 2
    shown = capsys.readouterr().err.splitlines()
    assert shown[0::2] == ["epoch 3: accuracy 0.500"] * 2
    assert shown[1::2] == ["warning: key tau has no effect in run one", "warning: key tau has no effect in run two"]


def test_what_was_told_before_there_was_a_folder_is_in_its_log(tmp_path, capsys, logger_after_use):
    """At its time, once; and nothing of it in the log of another run."""
    console.listen(logging.WARNING)
    logger_after_use.info("of no run")
    logger_after_use.setLevel(logging.DEBUG)
    logger_after_use.warning("left out: a file")
    logger_after_use.info("reading")
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        setup_logging(tmp_path / run).info(run)
    told = [re.sub(f"^{STAMP} ", "", line) for line in (tmp_path / "one" / "log.txt").read_text().splitlines()]
    assert told == ["WARNING left out: a file", "INFO reading", "INFO one"]
    assert len((tmp_path / "two" / "log.txt").read_text().splitlines()) == 1
    assert capsys.readouterr().err.splitlines() == ["warning: left out: a file", "reading", "one", "two"]


class Terminal:
    """What stderr is within its context."""

    def __enter__(self):
        self._end, own = os.openpty()
        os.set_blocking(self._end, False)
        termios.tcsetwinsize(own, (24, 100))
        self._own, self._before = open(own, "w"), sys.stderr
        sys.stderr = self._own
        return self

    def shown(self) -> str:
        """All that was written so far; what is written to a terminal need not be there to be read at once."""
        self._own.write("\a")
        self._own.flush()
        text = b""
        while not text.endswith(b"\a"):
            assert select.select([self._end], [], [], 10)[0], text
            text += os.read(self._end, 100_000)
        return text[:-1].decode()

    def close(self):
        os.close(self._end)
        self._end = None

    def __exit__(self, *exception):
        sys.stderr = self._before
        with contextlib.suppress(OSError):  # what it has not taken, once it was closed
            self._own.close()
        if self._end is not None:
            self.close()


@pytest.mark.parametrize(
    "environment, colours",
    [({}, True), ({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
def test_warnings_and_errors_have_a_colour_where_a_terminal_shows_it(environment, colours, tmp_path, monkeypatch):
    for name, value in {"NO_COLOR": "", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, environment.get(name, value))
    with Terminal() as terminal:
        logger = setup_logging(tmp_path)
        for tell in (logger.info, logger.warning, logger.error):
            tell("one thing")
        lines = terminal.shown().splitlines()
    plain = [re.sub(r"\033\[\d+m", "", line) for line in lines]
    assert plain == ["one thing", "warning: one thing", "error: one thing"]
    assert ["\033" in line for line in lines] == [False, colours, colours]
    assert "\033" not in (tmp_path / "log.txt").read_text()


def test_bar_shows_rate_and_leaves_log_lines_whole(tmp_path):
    with Terminal() as terminal:
        logger = setup_logging(tmp_path)
        with Reporter.epoch_bar(200, "stage 1 B epoch 2") as bar:
            for _ in range(2):
                bar.update(100)
                bar.refresh()
            logger.info("epoch 2 done")
        output = terminal.shown()
    assert "stage 1 B epoch 2: 100%" in output and "200/200" in output
    assert re.search(r"\[\d+:\d+<\d+:\d+, +[\d.]+k? images/s\]", output)
    assert "epoch 2 done" in re.split(r"[\r\n]+", output)


def test_a_terminal_that_is_closed_under_a_bar_ends_nothing(tmp_path):
    """The log goes on, and has why the console did not."""
    with Terminal() as terminal:
        logger = setup_logging(tmp_path)
        with Reporter.epoch_bar(200, "epoch") as bar:
            bar.update(100)
            terminal.close()
            for _ in range(2):
                bar.update(50)
                bar.refresh()
                logger.warning("going on")
        print("one word more", file=sys.stderr, flush=True)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines if "WARNING" in line] == ["going on"] * 2
    assert len([line for line in lines if re.search("DEBUG the console takes no more .*Errno 5", line)]) == 1


def test_a_log_that_is_full_is_told_once(tmp_path, capsys):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    logger = setup_logging(tmp_path)
    for epoch in range(3):
        logger.info("epoch %d", epoch)
    shown = capsys.readouterr().err
    assert [line for line in shown.splitlines() if "epoch" not in line] == [
        f"warning: {tmp_path}/log.txt lacks what follows: [Errno 28] No space left on device"
    ]
    assert shown.count("epoch") == 3


# Of each: what is done, where stdout and stderr lead, the exit status.
ENDS = {
    "a result that is lost": ("print('7')", "full", "kept", 2),
    "a reader that has read enough": ("print('7')", "gone", "kept", 0),
    "no console": ("logger.warning('x'); print('7', file=sys.stderr)", "kept", "full", 0),
    "nobody listens": ("logger.warning('x'); print('7')", "gone", "gone", 0),
    "stopped": ("stop()", "kept", "gone", 75),
    "mistaken": ("open('/nothing')", "full", "full", 2),
    "no character for it": ("print(chr(8364))", "kept", "kept", 0),
    "closed when it began": ("assert os.readlink('/proc/self/fd/2') == '/dev/null'", "kept", "kept", 0),
}
PROGRAM = """
import json, logging, os, sys
from asib_jax.record.signals import Interrupted
from asib_jax.tools import command_line

logger, statuses = logging.getLogger("asib_jax"), {}

def stop():
    raise Interrupted("by SIGHUP")

for name, (does, *streams, _) in json.loads(sys.argv.pop()).items():
    if not (child := os.fork()):
        for descriptor, stream in enumerate(streams, 1):
            if stream == "full":
                os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)
            if stream == "gone":
                reader, writer = os.pipe()
                os.close(reader)
                os.dup2(writer, descriptor)
        command_line.run(lambda: exec(does))
    statuses[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(statuses))
"""


def test_what_cannot_be_told_changes_the_status_only_of_what_was_to_be_printed():
    """Of processes of their own, with stderr closed before they began; Python's for a flush that failed is 120."""
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", PROGRAM, json.dumps(ENDS)],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        stdout=subprocess.PIPE,
        text=True,
    )
    *printed, statuses = done.stdout.splitlines()
    assert json.loads(statuses) == {name: end[-1] for name, end in ENDS.items()}
    assert printed == ["\\u20ac"]
