"""Signals in a process of their own: the first asks; one that insists, coming again, ends."""

import pathlib
import signal
import subprocess
import sys
import threading
from signal import SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1

import pytest

from asib_jax.record.signals import Stop

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPT = """
import signal, sys
from asib_jax.record.signals import Stop

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
before = {number: signal.getsignal(number) for number in signal.valid_signals()}
with Stop() as stop:
    assert stop.asked == ""
    for number in sys.argv[1:]:
        signal.raise_signal(int(number))
        print(stop.asked, flush=True)
assert before == {number: signal.getsignal(number) for number in signal.valid_signals()}
"""


def raised(*numbers: int, shell: str = 'exec "$@"') -> subprocess.CompletedProcess:
    return subprocess.run(
        ["sh", "-c", shell, "sh", sys.executable, "-c", SCRIPT, *(str(int(number)) for number in numbers)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("number", [SIGTERM, SIGINT, SIGQUIT])
@pytest.mark.parametrize("times", [1, 2])
def test_the_first_asks_and_the_second_ends(number, times):
    done = raised(*[number] * times)
    assert done.stdout == f"{number.name}\n" and f"{number.name}: stopping at the next training step" in done.stderr
    assert done.returncode == (0 if times == 1 else 128 + number)


@pytest.mark.parametrize(
    "numbers, ends",
    [
        ((SIGHUP, SIGHUP), False),  # the terminal and the shell in it tell of one end each
        ((SIGUSR1, SIGUSR1, SIGTERM), False),  # SLURM's warning, and the time is up
        ((SIGTERM, SIGHUP), False),
        ((SIGUSR1, SIGTERM, SIGTERM), True),
        ((SIGHUP, SIGINT, SIGQUIT), True),
    ],
)
def test_what_comes_by_itself_asks_alone(numbers, ends):
    done = raised(*numbers)
    assert set(done.stdout.split()) == {numbers[0].name}  # the name of the first
    assert done.returncode == (128 + numbers[-1] if ends else 0)


def test_under_nohup_a_closed_terminal_stops_nothing():
    done = raised(SIGHUP, SIGHUP, shell='trap "" HUP; exec "$@"')
    assert done.stdout.split() == [] and done.returncode == 0 and "stopping" not in done.stderr


def test_a_console_that_is_gone_stops_no_snapshot():
    """What is told goes to a full disk, or nowhere; a signal is heard all the same."""
    for gone in ("2>/dev/full", "2>&-"):
        done = raised(signal.SIGTERM, shell=f'exec "$@" {gone}')
        assert (done.stdout, done.returncode) == ("SIGTERM\n", 0)


def test_in_another_thread_no_signal_is_heard_and_none_changed():
    before, found = signal.getsignal(signal.SIGTERM), []

    def work():
        with Stop() as stop:
            found.append((stop.asked, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [("", before)] and signal.getsignal(signal.SIGTERM) == before
