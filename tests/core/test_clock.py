import time

import pytest

from pdjax.core.clock import VirtualClock, WallClock

pytestmark = pytest.mark.smoke


def test_naps_are_short_while_there_is_patience_and_then_double(monkeypatch):
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    clock = WallClock(shortest=1e-4, longest=1e-3, patience=2)
    for turn in range(1, 9):
        clock.idle(turn)
    assert naps == [1e-4, 1e-4, 1e-4, 2e-4, 4e-4, 8e-4, 1e-3, 1e-3]
    clock.idle(10**6)
    assert naps[-1] == 1e-3


def test_wall_time_begins_at_zero_and_goes_on():
    clock = WallClock()
    first = clock.now()
    assert 0 <= first <= clock.now() < 60


def test_virtual_time_moves_by_ticks_and_when_it_is_told():
    clock = VirtualClock(tick=2.0)
    clock.idle()
    clock.advance(0.5)
    assert clock.now() == 2.5
    clock.advance_to(1.0)
    assert clock.now() == 2.5
    with pytest.raises(ValueError, match="seconds=-1: time does not run backwards"):
        clock.advance(-1)
