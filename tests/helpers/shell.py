"""The commands of documents, run in this process or checked only."""

import re
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pdjax import cli
from pdjax.flags import config_of, status
from tests.helpers.fences import ROOT

OF_THE_SHELL = {"git", "cd", "source", "curl"}


def run_command(words: list[str], runs: bool) -> None:
    """Run a command, or check that what it names exists.

    Args:
      words: of the command line.
      runs: whether it is run; else its flags are parsed.

    Raises:
      AssertionError: it fails, or names what does not exist.
    """
    line = " ".join(words)
    if words[0] in OF_THE_SHELL:
        return
    if words[0] == "make":
        for target in words[1:]:
            assert _is_target(target), line
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for named in re.findall(r"\[([\w,]+)\]", line):
            assert set(named.split(",")) <= set(extras["optional-dependencies"]), line
    elif words[0] == "pdjax" and words[1] not in ("--help", "--version"):
        command = cli.COMMANDS[words[1]]
        _call(command.main, command.values, words[1:], runs, line)
    elif words[:2] == ["python", "-m"]:
        _module(words[2:], runs, line)
    elif words[0] != "pdjax":
        assert words[0] == "python" and (ROOT / words[1]).is_file(), line


def _is_target(name: str) -> bool:
    return re.search(rf"^{re.escape(name)}:", (ROOT / "Makefile").read_text(), re.M) is not None


def _module(words: list[str], runs: bool, line: str) -> None:
    name = words[0]
    package = find_spec(name)
    assert package is not None, line
    found = find_spec(f"{name}.__main__") if package.submodule_search_locations else package
    assert found is not None and found.origin is not None, line
    if not name.startswith("experiments."):
        text = Path(found.origin).read_text("utf-8")
        for flag in re.findall(r"--(?:no)?(\w+)", line):
            assert f'"{flag}"' in text, f"{line}: no flag {flag}"
        return
    module = import_module(found.name)
    _call(module.main, module.FLAGS, words, runs, line)


def _call(main: Any, values: Any, words: list[str], runs: bool, line: str) -> None:
    def look() -> None:
        # Else a flag of its own has that name, or the config is one that the program makes.
        if {"config", "config.FIELD"} <= set(values) and values["config"].value is not None:
            config_of(values)

    code = status(main if runs else look, values, "", words)
    assert code == 0, f"{line}: exit status {code}"
