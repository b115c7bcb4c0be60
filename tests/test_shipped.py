"""The command `asib`, what the package ships, and what `--help` and `--list_keys` tell."""

import pathlib
import re
import sys
import tomllib
import types

import pytest
from launching import ROOT, launch

from asib_jax import shipped
from asib_jax.errors import UserError
from asib_jax.models import MODELS
from asib_jax.recipe import keys, read
from asib_jax.tools import usage

ASIB = pathlib.Path("..") / "asib_jax" / "__main__"  # as `launch` names scripts
COMMANDS = {"train", "evaluate", "predict", "export", "benchmark", "check-devices"}


def test_the_installed_package_has_every_wing_and_puts_no_other_name_into_an_environment():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    wings = {f"asib_jax.{path.parent.name}" for path in (ROOT / "asib_jax").glob("*/__init__.py")}
    assert {*build["packages"]} == {"asib_jax", "asib_jax.shipped.configs", "asib_jax.shipped.launch"} | wings
    assert build["package-dir"] == {f"asib_jax.shipped.{name}": name for name in ("configs", "launch")}


def test_a_shipped_configuration_is_found_by_name_and_a_file_of_that_name_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.path("l2_cccp:digits") == f"{ROOT / 'configs' / 'l2_cccp.py'}:digits"
    assert shipped.path("l2_cccp.py:digits") == shipped.path("l2_cccp:digits")
    assert shipped.path("l2_cccp") == str(ROOT / "configs" / "l2_cccp.py")
    for other in ("configs/l2_cccp.py:digits", "mine.py", "profiles", "l2_ccc", ""):
        assert shipped.path(other) == other
    (tmp_path / "l2_cccp").touch()
    assert shipped.path("l2_cccp:digits") == "l2_cccp:digits"


def test_a_configuration_is_read_beside_a_package_of_the_callers_that_has_its_name(monkeypatch):
    from configs import l2_cccp

    expected = read(l2_cccp.get_config("digits"))
    theirs = types.ModuleType("configs")
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "configs", theirs)
    before = [*sys.path]
    assert read(shipped.config("l2_cccp:digits")) == expected
    assert sys.modules["configs"] is theirs and "configs.base" not in sys.modules and sys.path == before


@pytest.mark.parametrize(
    "name, message", [("l2_ccc", "config='l2_ccc' is unknown; .*l2_cccp"), ("base:x", "'x'.*digit")]
)
def test_an_unknown_configuration_is_told_with_those_that_there_are(name, message):
    with pytest.raises(UserError, match=message):
        shipped.config(name)


def test_asib_does_what_the_script_does():
    own = launch(ASIB, "train", "--config=ce_only:digits", "--dry_run")
    script = launch("main", "--config=configs/ce_only.py:digits", "--dry_run")
    assert own.returncode == script.returncode == 0, own.stderr
    assert own.stdout == script.stdout != ""


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_asib_tells_its_commands(arguments):
    told = launch(ASIB, *arguments)
    assert told.returncode == 0 and {*re.findall(r"[\w-]+", told.stdout.splitlines()[-1])} >= COMMANDS


def test_an_unknown_command_is_status_2():
    told = launch(ASIB, "tran", "x")
    assert told.returncode == 2 and told.stderr.startswith("error: 'tran' is no command; there are train, ")


def test_help_lists_flags_configurations_profiles_and_networks():
    told = launch("main", "--help")
    assert told.returncode == 0 and not told.stderr
    words = {*re.findall(r"[\w-]+", told.stdout)}
    assert {"--resume", "--dry_run", "--verbose", "--coordinator", "--list_keys"} <= words
    assert {"l2_cccp", "ce_only", "digits", "small", *MODELS} <= words
    assert max(map(len, told.stdout.splitlines())) <= 110  # docstrings of scripts among them
    assert "networks:" not in launch("export", "--help").stdout


@pytest.mark.parametrize(
    "arguments",
    [("--list_keys=^tau",), ("--list_keys", "^tau"), ("-list_keys=^TAU",), ("--list_keys=^tau", "--list_keys")],
)
def test_keys_are_listed_by_pattern_without_a_configuration(arguments):
    told = launch("main", *arguments)
    assert told.returncode == 0
    assert re.findall(r"^  (\S+) =", told.stdout, re.MULTILINE) == ["tau", "tau_schedule", "tau_decay_power"]
    assert "  tau = 4.0\n      distillation temperature" in told.stdout


def test_a_flag_is_no_pattern():
    assert launch("main", "--list_keys", "--config=l2_cccp").stdout == launch("main", "--list_keys").stdout != ""
    assert "Unknown command line flag 'list_keysx'" in launch("main", "--list_keysx=tau").stderr


def test_a_file_of_configuration_may_have_profiles_of_its_own(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from configs import ce_only\n\ndef get_config(profile):\n"
        "    config = ce_only.get_config('digits')\n    config.seed = {'': 0, 'other': 7}[profile]\n    return config\n"
    )
    told = launch("main", f"{tmp_path / 'mine.py'}:other", "--dry_run")
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("data: digits")


def test_all_keys_are_listed_with_their_meaning():
    text = usage.keys_text("")
    told = " ".join(text.split())
    for held in keys.walk(read(shipped.config("base"))):
        assert f"  {held.name} = {held.value!r}" in text.splitlines()
        assert held.key.meaning.replace("`", "") in told
    assert "teacher1.finetune_lr" in usage.keys_text("learning rate of fine-tuning")


@pytest.mark.parametrize("pattern, message", [("xyzzy", "no key has that"), ("(", "no regular expression")])
def test_a_pattern_that_finds_nothing_is_status_2(pattern, message):
    told = launch("main", f"--list_keys={pattern}")
    assert told.returncode == 2 and message in told.stderr and len(told.stderr.splitlines()) == 1
