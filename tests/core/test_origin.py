"""The commit of this code, and the versions of packages."""

import subprocess

import pytest

from pdjax.core import origin
from tests.helpers.fences import ROOT


def test_versions_are_of_python_and_of_what_is_installed():
    found = origin.versions("numpy", "no_such_package")
    assert set(found) == {"python", "numpy"}


def test_an_export_knows_its_commit_and_a_copy_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(origin, "ROOT", ROOT / "experiments")  # a copy within this checkout
    assert origin.commit() is None
    monkeypatch.setattr(origin, "EXPORTED", "f" * 40)
    assert origin.commit() == "f" * 40
    assert (ROOT / ".gitattributes").read_text() == "pdjax/core/origin.py export-subst\n"


@pytest.mark.parametrize(
    ("file", "mark"), [(None, ""), ("known.txt", "+"), ("new.py", "+"), ("results.json", "")]
)
def test_a_commit_has_a_plus_where_the_code_is_not_all_in_it(file, mark, tmp_path, monkeypatch):
    def git(*args: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", *who, *args], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "known.txt").write_text("a")
    git("init")
    git("add", "-A")
    git("commit", "-m", "first")
    if file:
        (tmp_path / file).write_text("b")
    monkeypatch.setattr(origin, "ROOT", tmp_path.resolve())
    monkeypatch.setattr(origin, "EXPORTED", "$")
    found = origin.commit()
    assert found is not None and len(found.rstrip("+")) == 40 and found[40:] == mark
