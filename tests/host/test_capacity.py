"""Capacity goodput from the counts of runs at some rates."""

import pytest

from pdjax.host.metrics.capacity import Capacity, Point, capacity, find_capacity


def test_the_highest_rate_up_to_which_every_rate_holds():
    found = capacity([Point(8, 60, 100), Point(2, 100, 100), Point(4, 95, 100), Point(6, 85, 100)])
    assert [point.rate for point in found.points] == [2, 4, 6, 8]
    assert found.best == Point(4, 95, 100) and found.next == Point(6, 85, 100)
    assert found.interpolated == pytest.approx(5.0)
    told = found.to_json(chips=2)
    assert (told["rate"], told["good"], told["total"], told["per_gpu"]) == (4, 95, 100, 2.0)
    assert told["points"][0] == {"rate": 2, "good": 100, "total": 100}


def test_a_rate_behind_one_that_fails_does_not_count():
    found = capacity([Point(1, 10, 10), Point(2, 8, 10), Point(3, 10, 10)])
    assert found.best == Point(1, 10, 10)


def test_exactly_the_share_is_enough_and_runs_of_one_rate_are_pooled():
    assert capacity([Point(1, 9, 10)]).best == Point(1, 9, 10)
    assert capacity([Point(1, 63, 70)], share=0.9).best == Point(1, 63, 70)
    assert capacity([Point(1, 89, 100)]).best is None
    pooled = capacity([Point(1, 8, 10), Point(1, 10, 10)])
    assert pooled.points == (Point(1, 18, 20),) and pooled.best == pooled.points[0]


def test_nothing_holds_or_nothing_fails():
    nothing = capacity([Point(1, 0, 10), Point(2, 0, 0)])
    assert nothing.best is None and nothing.interpolated is None
    assert nothing.to_json(None)["rate"] is None
    everything = capacity([Point(1, 10, 10)])
    assert everything.next is None and everything.interpolated is None
    assert everything.to_json(None)["per_gpu"] is None


@pytest.mark.parametrize("start", [0.1, 7.0, 300.0])
def test_bisection_comes_as_close_as_it_is_told(start: float):
    asked = []

    def measure(rate: float) -> Point:
        asked.append(rate)
        return Point(rate, 100 if rate <= 9.3 else 50, 100)

    found = find_capacity(measure, start, resolution=0.02)
    best, worse = found.best, found.next
    assert best is not None and worse is not None
    assert best.rate <= 9.3 < worse.rate <= best.rate * 1.02
    assert len(asked) == len(set(asked)) <= 18


@pytest.mark.parametrize(("good", "last"), [(10, 8.0), (0, 0.125)])
def test_a_search_without_an_end_ends(good: int, last: float):
    found = find_capacity(lambda rate: Point(rate, good, 10), 1.0, doublings=3)
    assert len(found.points) == 4 and last in {point.rate for point in found.points}
    assert isinstance(found, Capacity) and (found.best is None) == (good == 0)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: capacity([], share=0.0), "share=0.0: must be in"),
        (lambda: find_capacity(lambda rate: Point(rate, 1, 1), 0.0), "start=0.0: must be more"),
        (
            lambda: find_capacity(lambda rate: Point(rate, 1, 1), 1.0, resolution=0.0),
            "resolution=0.0: must be more",
        ),
    ],
)
def test_what_is_no_search_is_refused(make, match: str):
    with pytest.raises(ValueError, match=match):
        make()
