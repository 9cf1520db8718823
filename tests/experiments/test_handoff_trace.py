"""Times of a hand-off by the profiler's clock, read from hand-made traces."""

from types import SimpleNamespace
from typing import Any

import pytest

from experiments.handoff import trace as handoff_trace
from experiments.handoff.trace import Traced, read, traced


def event(name: str, begin: float, end: float, **stats: Any) -> Any:
    return SimpleNamespace(
        name=name, start_ns=begin * 1e6, duration_ns=(end - begin) * 1e6, stats=stats.items()
    )


def kernel(module: str, begin: float, end: float) -> Any:
    return event("kernel", begin, end, hlo_module=module)


def copy(begin: float, end: float, nbytes: int) -> Any:
    details = f"kind_src:device kind_dst:device size:{nbytes} dest:1 async:1"
    return event("MemcpyP2P", begin, end, memcpy_details=details)


def plane(computed: list[Any], copied: list[Any], name: str = "/device:GPU:0") -> Any:
    lines = [("Stream #1(Compute)", computed), ("Stream #2(MemcpyP2P)", copied)]
    lines.append(("XLA Ops", computed))
    return SimpleNamespace(name=name, lines=[SimpleNamespace(name=n, events=e) for n, e in lines])


STEP = [kernel("jit_group", 100, 104), kernel("jit_group", 105, 109), kernel("jit_step", 112, 113)]
GATHERS = [kernel("jit_gather", 104, 105), *(kernel("jit_gather", at, at + 1) for at in (110, 111))]
PUT = copy(10, 14, 800)
COPIES = [copy(105.5, 107.5, 300), copy(112.25, 115.25, 500)]


def test_two_shipments_beside_a_plain_put():
    seen = read([plane([*STEP, *GATHERS], [PUT, *COPIES]), plane(STEP, [], name="/host:CPU")])
    assert seen == Traced(
        put_bytes=800,
        put_ms=4.0,
        nbytes=800,
        copy_ms=5.0,
        gather_ms=3.0,
        wait_ms=0.75,
        behind_ms=6.25,
    )
    assert seen is not None
    assert seen.of_put == 0.8
    assert seen.of_put_in_all == pytest.approx(4 / 8.75)


def test_pieces_of_one_gather_wait_once():
    pieces = [copy(105.5, 107.5, 300), copy(107.5, 110.5, 500)]
    seen = read([plane([*STEP[:2], GATHERS[0]], [PUT, *pieces])])
    assert seen is not None
    assert (seen.wait_ms, seen.copy_ms, seen.behind_ms) == (0.5, 5.0, 6.5)


def test_copies_to_two_devices_at_once_count_once():
    pieces = [copy(105.5, 107.5, 400), copy(105.5, 107.5, 400)]
    seen = read([plane([*STEP[:2], GATHERS[0]], [PUT, *pieces])])
    assert seen is not None
    assert (seen.copy_ms, seen.wait_ms, seen.of_put) == (2.0, 0.5, 2.0)


def test_a_copy_that_ends_after_the_next_gather():
    late = [copy(105.5, 112.5, 300), copy(112.5, 115.25, 500)]
    seen = read([plane([*STEP, *GATHERS], [PUT, *late])])
    assert seen is not None
    assert (seen.wait_ms, seen.behind_ms) == (0.5, 6.25)


def test_a_gather_of_which_this_device_sends_nothing():
    seen = read([plane([*STEP, *GATHERS], [PUT, COPIES[0]])])
    assert seen is not None and seen.behind_ms == 3.5


def test_two_senders_share_what_a_put_takes_over_one_link():
    halves = [
        plane([*STEP[:2], GATHERS[0]], [copy(105, 107, 400)], name=f"/device:GPU:{i}")
        for i in range(1, 3)
    ]
    seen = read([plane(STEP, [PUT]), *halves])
    assert seen is not None
    assert (seen.nbytes, seen.of_put) == (400, 1.0)


def test_of_several_devices_the_slowest_counts():
    quick = plane([*STEP, GATHERS[0]], [copy(105.5, 106.5, 300)], name="/device:GPU:1")
    seen = read([quick, plane([*STEP, *GATHERS], [PUT, *COPIES])])
    assert seen is not None
    assert (seen.put_ms, seen.nbytes, seen.of_put) == (4.0, 800, 0.8)


@pytest.mark.parametrize(
    ("computed", "copied"),
    [(STEP, [PUT]), ([*STEP, *GATHERS], [PUT]), ([*STEP, *GATHERS], COPIES), ([], [])],
)
def test_what_was_not_seen_is_not_reported(computed: list[Any], copied: list[Any]):
    assert read([plane(computed, copied)]) is None


def test_medians_over_traces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(handoff_trace, "REST", 0.0)
    acts: list[str] = []
    lengths = iter([3, 1, 8])

    def trace(act: Any) -> list[Any]:
        act()
        return [plane([*STEP, *GATHERS], [copy(10, 10 + next(lengths), 800), *COPIES])]

    monkeypatch.setattr(handoff_trace, "trace", trace)
    seen = traced(lambda: acts.append("put"), lambda: acts.append("serve"), rounds=3)
    assert seen is not None
    assert (seen.put_ms, seen.copy_ms, seen.traces) == (3.0, 5.0, 3)
    assert acts == ["put", "serve"] * 3
    monkeypatch.setattr(handoff_trace, "trace", lambda act: [])
    assert traced(lambda: None, lambda: None, rounds=2) is None
