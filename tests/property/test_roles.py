"""Random walks on which engines change roles, drain, fail and come back."""

import pytest

from tests.helpers.shifting import Shifting
from tests.helpers.walks import run_all

SEEDS = 30


@pytest.mark.parametrize("faults", [False, True])
def test_engines_that_change_roles_hurt_nobody(faults):
    happened = run_all(range(60_000, 60_000 + SEEDS), faults=faults, make=Shifting)
    wanted = {"change refused", "draining", "drained at work", "out of service", "preempted"}
    wanted |= {"stood in"} if faults else set()
    assert wanted <= happened.keys(), f"never happened: {wanted - happened.keys()}"
    if not faults:
        assert "FAILED" not in happened
