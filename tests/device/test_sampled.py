"""Tokens of a mixed step on their way to the host."""

from typing import Any

import pytest

from pdjax.device.programs.sampled import BothTickets


class Failed:
    """A ticket that has failed, and mends what is its own when it is read."""

    def __init__(self, name: str, mended: list[str]) -> None:
        self._name, self._mended = name, mended

    def ready(self) -> bool:
        return True

    def result(self) -> Any:
        self._mended.append(self._name)
        raise RuntimeError(f"{self._name}: the device has failed")


def test_a_mixed_step_that_has_failed_mends_the_state_of_its_rows():
    """The program of the rows looks at the pool and at its own state; that of the chunks, at the
    pool alone."""
    mended: list[str] = []
    chunks: Any = Failed("chunks", mended)
    rows: Any = Failed("rows", mended)
    with pytest.raises(RuntimeError, match="rows: the device has failed"):
        BothTickets(chunks, rows).result()
    assert mended == ["rows"]
