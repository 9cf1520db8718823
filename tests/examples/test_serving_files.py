"""The files for those who run a server: the unit, the container, the commands of load generators.
What they name exists: flags, files, paths of the server."""

import re
import shlex
import stat
import subprocess
import sys
from configparser import RawConfigParser
from pathlib import Path

import pytest

from pdjax.cli import serve
from pdjax.serving.app import PATHS
from tests.helpers.fake_backend import FakeBackend, served
from tests.helpers.fences import ROOT

FOLDER = ROOT / "examples/serving"


def joined(path: Path) -> str:
    return re.sub(r"\\\n\s*", " ", path.read_text("utf-8"))


def flags_of(text: str) -> dict[str, str]:
    """The flags of `pdjax serve` in a line."""
    return dict(re.findall(r"--(\w+)=([^\s\"\]]+)", text))


def test_the_unit_starts_a_server_and_lets_it_drain():
    unit = RawConfigParser(strict=False)  # several Environment
    unit.read_string(joined(FOLDER / "pdjax.service"))
    service = unit["Service"]
    program, command, *_ = shlex.split(service["ExecStart"])
    flags = flags_of(service["ExecStart"])
    assert (Path(program).name, command) == ("pdjax", "serve")
    assert flags["host"] == "127.0.0.1" and set(flags) <= set(serve.COMMAND.values)
    assert int(service["TimeoutStopSec"]) > float(flags["drain_s"]) + 10
    assert service["KillSignal"] == "SIGTERM"


def test_the_container_has_what_it_copies_and_starts_a_server():
    text = joined(FOLDER / "Containerfile")
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    started = " ".join(re.findall(r"^(?:ENTRYPOINT|CMD) (.*)$", text, re.MULTILINE))
    flags = flags_of(started)
    assert set(flags) <= set(serve.COMMAND.values)
    assert (ROOT / flags["config"]).is_file()
    for config in re.findall(r"--config=(\S+)", text):
        assert (ROOT / config.strip("\"']")).is_file(), config
    [probed] = re.findall(r"http://127.0.0.1:(\d+)(/\w+)", text)
    assert probed == (flags["port"], "/ready") and probed[1] in PATHS


@pytest.mark.parametrize("name", ["aiperf", "guidellm", "lm_eval", "schemathesis"])
def test_the_commands_of_other_programs_are_whole(name: str, tmp_path: Path):
    """A program of that name is started with all its arguments; what it does with them is its
    own matter."""
    script = FOLDER / f"{name}.sh"
    assert script.stat().st_mode & stat.S_IXUSR
    program = tmp_path / name
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    (tmp_path / "python3").symlink_to(sys.executable)
    with served(lambda: FakeBackend(tmp_path / "fake")) as at:
        told = subprocess.run(
            [script],
            cwd=tmp_path,
            env={"PATH": f"{tmp_path}:/usr/bin:/bin", "URL": at.url, "MODEL": "m"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    command, _, own = told.partition("\n\n")
    found = command.split("\n")
    assert any(at.url in word for word in found)
    assert all(word.strip() == word for word in found)
    formats = re.findall(r"request_format=(\S+)", command)
    assert set(formats) <= set(PATHS)
    has_own = "own_numbers.py" in script.read_text("utf-8")
    assert has_own == (f"What {at.url} itself has measured" in own)


def test_the_servers_own_numbers_are_those_of_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    body = '{"prompt": "x", "max_tokens": 5, "n": 2, "temperature": 1}'
    ask = (
        "import sys, urllib.request as r; r.urlopen(r.Request(sys.argv[1] + '/v1/completions', "
        "sys.argv[2].encode(), {'content-type': 'application/json'}))"
    )
    with served(lambda: FakeBackend(tmp_path)) as at:
        command = [sys.executable, str(FOLDER / "own_numbers.py"), at.url]
        for _ in range(2):
            subprocess.run([*command, sys.executable, "-c", ask, at.url, body], check=True)
            told = capfd.readouterr().out
            assert re.search(r"^choices that ended +2$", told, re.MULTILINE), told
            assert re.search(r"^output tokens +10$", told, re.MULTILINE), told


def test_the_documents_list_every_file():
    for page in ("docs/serving.md", "examples/README.md"):
        text = (ROOT / page).read_text("utf-8")
        for file in FOLDER.iterdir():
            assert f"serving/{file.name})" in text, f"{page}: {file.name}"
