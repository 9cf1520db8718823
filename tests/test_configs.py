"""Every committed config loads, and says how to run it and what to expect."""

from pathlib import Path

import pytest

from pdjax.config.load import load_config

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda f: f.stem)
def test_configs_load_and_say_how_to_run(file: Path):
    assert load_config(file).devices >= 1
    text = file.read_text("utf-8")
    assert "Run:" in text
    assert "Expect:" in text
