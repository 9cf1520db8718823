"""Two builds beside each other: old checkouts have a file an experiment, new ones a package."""

from pathlib import Path

import pytest

from experiments.bench_scale.__main__ import ORIGINS, commit_of
from experiments.beside.__main__ import check_has, numbers


@pytest.mark.parametrize("file", ["experiments/handoff.py", "experiments/handoff/__main__.py"])
def test_a_build_of_either_layout_has_its_experiments(file: str, tmp_path: Path):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.touch()
    check_has(tmp_path, "handoff")
    with pytest.raises(ValueError, match=f"run='mixes': no such experiment in {tmp_path}"):
        check_has(tmp_path, "mixes")


@pytest.mark.parametrize("file", ORIGINS)
def test_an_export_of_either_layout_says_its_commit(file: str, tmp_path: Path):
    assert commit_of(None) is None and commit_of(tmp_path) is None
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(f'EXPORTED = "{"0a" * 20}"\n')
    assert commit_of(tmp_path) == "0a" * 20
    path.write_text('EXPORTED = "$Format:%H$"\n')
    assert commit_of(tmp_path) is None


def test_numbers_are_found_by_their_paths():
    tree = {"a": {"b": [1, 2.5, True, "x"]}, "c": None, "d": 3}
    assert dict(numbers(tree)) == {"a.b[0]": 1.0, "a.b[1]": 2.5, "d": 3.0}
