"""The command `asib`, or `python -m asib_jax`: the scripts of launch/ under one name, from any folder.

    asib train l2_cccp:digits                   python launch/main.py --config=configs/l2_cccp.py:digits
    asib evaluate results/latest                python launch/evaluate.py --run=results/latest

A configuration is a file or the name of a shipped one. `asib COMMAND --help` tells a command's flags.
"""

import runpy
import sys

from asib_jax import shipped

COMMANDS = {
    "train": "main",
    "evaluate": "evaluate",
    "predict": "predict",
    "export": "export",
    "benchmark": "benchmark",
    "check-devices": "check_devices",
}


def main() -> None:
    """Run the script of the command, as if it had been called with the other arguments."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("--help", "-h", "help"):
        print(f"{__doc__}\ncommands: {', '.join(COMMANDS)}")
        return
    if command not in COMMANDS:
        sys.exit(_unknown(command))
    sys.argv = [f"asib {command}", *arguments]
    runpy.run_path(str(shipped.HOME / "launch" / f"{COMMANDS[command]}.py"), run_name="__main__")


def _unknown(command: str) -> int:
    print(f"error: {command!r} is no command; there are {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
