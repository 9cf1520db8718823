"""Fixtures of the end-to-end tests."""

from dataclasses import replace

import pytest

from pdjax.device.models import sampling
from tests.helpers.promise import expected


@pytest.fixture
def few_variants(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the programs that choose tokens, a test has the least one, the one that can do all, and
    for batches without a history all but penalties: each layout compiles its own. `expected` has
    those that there are, and so have tests of the smoke subset."""
    expected()
    if request.node.get_closest_marker("smoke") is None:
        first, *_, last = sampling.VARIANTS
        monkeypatch.setattr(sampling, "VARIANTS", (first, replace(last, penalize=False), last))
