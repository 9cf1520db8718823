"""Workloads that are drawn by chance, and the schedule by which they are played."""

import math

import numpy as np
import pytest

from pdjax.workloads.arrival import Arrival, Piece, tokens_of
from pdjax.workloads.chances import Arrivals, Gaps, Uniform, fixed
from pdjax.workloads.schedule import Schedule
from pdjax.workloads.synthetic import (
    Shape,
    ShapeMix,
    closed_loop,
    conversations,
    open_loop,
    poisson,
    regular,
    shared_prefixes,
)

SHAPE = Shape(Uniform(5, 50), Uniform(1, 9))


def test_tokens_are_those_of_their_key_and_a_shorter_piece_is_the_beginning_of_a_longer_one():
    long, short = tokens_of("a", 500, 97), tokens_of("a", 20, 97)
    assert (long[:20] == short).all() and long.dtype == np.int32
    assert (long.min(), long.max()) == (1, 96)
    assert np.bincount(tokens_of("b", 96_000, 97))[1:] == pytest.approx(1000, abs=160)
    assert (tokens_of("b", 500, 97) != long).mean() > 0.9
    # The same on every machine and in every version: saved workloads stay what they are.
    assert tokens_of("a", 6, 1000).tolist() == [26, 278, 638, 832, 249, 453]
    with pytest.raises(ValueError, match="vocab_size=1: must be at least 2"):
        tokens_of("a", 1, 1)


def test_an_open_loop_repeats_itself_and_another_rate_has_the_same_requests():
    first, again = (open_loop(Arrivals(2.0), SHAPE, 20, seed=4) for _ in range(2))
    faster = open_loop(Arrivals(8.0), SHAPE, 20, seed=4)
    assert first == again
    assert [each.pieces for each in first] == [each.pieces for each in faster]
    assert [a.moment for a in first] == pytest.approx([4 * b.moment for b in faster])
    other = open_loop(Arrivals(2.0), SHAPE, 20, seed=5)
    assert not {each.pieces for each in first} & {each.pieces for each in other}


def test_lengths_of_a_mix_stay_together():
    shapes = ShapeMix([Shape(fixed(1000), fixed(10)), Shape(fixed(30), fixed(200))], [1, 3])
    made = open_loop(Arrivals(1.0), shapes, 2000, seed=0)
    assert {(each.prompt, each.output) for each in made} == {(1000, 10), (30, 200)}
    assert np.mean([each.prompt == 30 for each in made]) == pytest.approx(0.75, abs=0.05)


def test_poisson_and_regular():
    made = poisson(4.0, 400, prompt=(3, 5), output=(2, 2), seed=1)
    assert {each.prompt for each in made} == {3, 4, 5} and {each.output for each in made} == {2}
    assert made[-1].moment == pytest.approx(100, rel=0.2)
    assert regular(0.5, [(3, 1), (4, 2)]) == [Arrival(0.0, 3, 1), Arrival(0.5, 4, 2)]


def test_prompts_share_nothing_unless_they_are_told_to():
    made = [
        *regular(1.0, [(40, 1)] * 50),
        *open_loop(Arrivals(1.0), Shape(fixed(40), fixed(1)), 50),
    ]
    calls = Schedule(made, 1000).take()
    assert len({call.prompt[:8] for call in calls}) == 100
    salted = Schedule(made, 1000, salt="x").take()
    assert not {c.prompt[:8] for c in calls} & {c.prompt[:8] for c in salted}


def test_shared_prefixes_are_the_same_tokens():
    made = shared_prefixes(Arrivals(1.0), fixed(64), Shape(fixed(8), fixed(1)), 400, 4, share=0.75)
    calls = Schedule(made, 5000).take()
    begins = {call.prompt[:64] for call in calls if len(call.prompt) == 72}
    assert len(begins) == 4
    assert np.mean([len(call.prompt) == 72 for call in calls]) == pytest.approx(0.75, abs=0.08)
    assert len({call.prompt[-8:] for call in calls}) == 400


def test_a_client_of_a_closed_loop_thinks_after_each_answer():
    made = closed_loop(2, SHAPE, 5, Gaps(3.0), seed=2)
    schedule = Schedule(made, 100)
    first, second = schedule.take(0.0)
    assert (first.arrival.session, second.arrival.session) == ("client0", "client1")
    assert schedule.take() == [] and schedule.next_moment is None
    schedule.ended(second, 10.0, answer=[1])
    [third] = schedule.take()
    assert (third.moment, third.id, third.arrival.turn) == (13.0, "r3", 1)
    assert len(third.prompt) == made[3].prompt
    assert [number for number, _ in schedule.broken(first)] == [2, 4]
    assert not schedule.has_followers(third)


def test_think_times_have_their_moments():
    thinks = [each.moment for each in closed_loop(10, SHAPE, 20_000, Gaps(2.0, 1.0))[10:]]
    assert np.mean(thinks) == pytest.approx(2, rel=0.05)
    assert np.std(thinks) == pytest.approx(2, rel=0.05)


def test_a_turn_asks_with_the_conversation_before_it():
    made = conversations(
        Arrivals(1.0, math.inf),
        first=Shape(fixed(10), fixed(4)),
        later=Shape(fixed(3), fixed(2)),
        turns=fixed(3),
        count=2,
        think=Gaps(5.0),
    )
    assert [each.id for each in made] == ["s0t0", "s0t1", "s0t2", "s1t0", "s1t1", "s1t2"]
    schedule = Schedule(made, 100)
    first, other = schedule.take()
    assert (first.moment, other.moment, len(first.prompt)) == (0.0, 1.0, 10)
    schedule.ended(first, 2.0, answer=[7, 7, 7, 7])
    [second] = schedule.take()
    assert second.moment == 7.0 and second.prompt[:14] == (*first.prompt, 7, 7, 7, 7)
    assert len(second.prompt) == 17 and second.request().labels == {"session": "s0"}
    # Nobody has told the tokens of this answer: others stand for them.
    schedule.ended(second, 8.0, answer=None, count=2)
    [third] = schedule.take()
    assert third.prompt[:17] == second.prompt and len(third.prompt) == 22


def test_sessions_have_the_turns_that_were_drawn():
    made = conversations(Arrivals(1.0), SHAPE, SHAPE, Uniform(1, 5), 2000, Gaps(1.0, 1.0), seed=3)
    assert len(made) / 2000 == pytest.approx(3, rel=0.05)
    assert len(Schedule(made, 100).take()) == 2000


def test_a_request_is_greedy_and_of_its_own_length():
    request = Arrival(1.5, 4, 6, pieces=(Piece("a", 3), Piece("b", 1))).request(7, 100)
    assert (request.id, request.arrival, len(request.prompt_token_ids)) == ("r7", 1.5, 4)
    params = request.params
    assert (params.temperature, params.seed, params.max_tokens) == (0.0, 7, 6)
    assert params.ignore_eos


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Arrival(-1.0, 1, 1), "moment=-1.0: must be 0 or more"),
        (lambda: Arrival(math.nan, 1, 1), "moment=nan"),
        (lambda: Arrival(0.0, 0, 1), "prompt=0: must be at least 1"),
        (lambda: Arrival(0.0, 3, 1, pieces=(Piece("a", 2),)), "all of them prompt=3"),
        (lambda: Arrival(0.0, 3, 1, continues=True), "continues=True: must come after"),
        (lambda: closed_loop(0, SHAPE, 1), "clients=0: must be at least 1"),
        (lambda: shared_prefixes(Arrivals(1.0), fixed(1), SHAPE, 1, 0), "groups=0"),
        (lambda: shared_prefixes(Arrivals(1.0), fixed(1), SHAPE, 1, 1, 1.5), "share=1.5"),
        (lambda: ShapeMix([SHAPE], []), "one above 0 for each kind"),
        (lambda: Schedule([Arrival(0, 1, 1, "a"), Arrival(0, 1, 1, "a")], 9), "id='a'"),
        (lambda: Schedule([Arrival(0, 1, 1, after="b")], 9), "after='b': must be a request before"),
    ],
)
def test_what_is_no_workload_is_refused(make, match: str):
    with pytest.raises(ValueError, match=match):
        make()
