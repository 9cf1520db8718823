"""What a listener is told of a request, and what a stream makes of it: every token, text and
log-probability of every choice, once, in order."""

import contextlib
import random
from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from pdjax.core.logprobs import TokenLogprobs
from pdjax.core.outputs import RequestEvent, RequestOutput, merged
from pdjax.entry import Entry
from pdjax.host.loop import Loop
from pdjax.host.sequences.sequence import State
from pdjax.interfaces.batches import Scores
from pdjax.stream import Backlog
from tests.helpers.house import Crosses, House, exact, raising, text_house


def check(events: list[RequestEvent], request_id: str) -> RequestOutput:
    """The events are those of the whole answer, which the last one has."""
    *before, last = events
    assert last.output is not None and all(event.output is None for event in before)
    of_choice: defaultdict[int, list[RequestEvent]] = defaultdict(list)
    for event in events:
        assert event.request_id == request_id
        of_choice[event.choice].append(event)
    assert sorted(of_choice) == list(range(len(last.output.choices)))
    for choice, its in of_choice.items():
        assert its[0].prompt_logprobs == last.output.prompt_logprobs
        assert all(event.prompt_logprobs is None for event in its[1:])
        whole = last.output.choices[choice]
        assert [token for event in its for token in event.token_ids] == whole.token_ids
        assert "".join(event.text for event in its) == whole.text
        assert [event.finish_reason for event in its[:-1]] == [None] * (len(its) - 1)
        ends = its[-1].finish_reason, its[-1].stop_reason, its[-1].error
        assert ends == (whole.finish_reason, whole.stop_reason, whole.error)
        if whole.logprobs is None:
            assert all(event.logprobs is None for event in its)
        else:
            assert [entry for event in its for entry in event.logprobs or ()] == whole.logprobs
            assert all(len(event.logprobs or ()) == len(event.token_ids) for event in its)
    return last.output


@pytest.mark.parametrize("stages", [(1,), (2,)])
def test_every_choice_is_told_with_tokens_text_and_log_probabilities(stages: tuple[int, ...]):
    house = House(make_text=lambda request: Crosses(), stages=stages, max_delay=2)
    events: list[RequestEvent] = []
    params = {"n": 3, "temperature": 1.0, "max_tokens": 9, "logprobs": 2, "ignore_eos": False}
    entry = house.session.submit(house.request(**params), "asked", on_event=events.append)
    house.rest()
    output = check(events, entry.request.id)
    assert output is entry.answer and output.prompt == "asked"
    assert len({tuple(choice.token_ids) for choice in output.choices}) == 3
    assert len(events) > 6, "one event a turn"
    assert house.session.book.take(entry.request.id) is None, "the event has had it"


def test_a_token_has_one_event_and_the_last_one_says_why_it_ended():
    house, events = text_house(), list[RequestEvent]()
    house.session.submit(house.request(max_tokens=4), on_event=events.append)
    house.rest()
    assert [len(event.token_ids) for event in events] == [1] * 4
    assert [event.finish_reason for event in events] == [None, None, None, "length"]


def test_a_choice_as_a_whole_has_one_event():
    house, events = text_house(), list[RequestEvent]()
    asked = house.request(n=2, temperature=1.0, logprobs=1)
    house.session.submit(asked, on_event=events.append, whole=True)
    house.rest()
    check(events, asked.id)
    assert sorted(event.choice for event in events) == [0, 1]


@pytest.mark.parametrize("turns", [0, 1, 4, 6])
def test_an_abort_is_told_of_every_choice(turns: int):
    house, events = text_house(), list[RequestEvent]()
    asked = house.request(n=2, temperature=1.0, max_tokens=30)
    house.session.submit(asked, on_event=events.append)
    for _ in range(turns):
        house.session.step()
    house.session.abort(asked.id)
    output = check(events, asked.id)
    assert [choice.finish_reason for choice in output.choices] == ["abort"] * 2
    house.rest()


def test_choices_that_end_in_one_turn_are_both_told():
    house, events = text_house(), list[RequestEvent]()
    asked = house.request(n=2, temperature=1.0, max_tokens=1)
    house.session.submit(asked, on_event=events.append)
    house.rest()
    check(events, asked.id)
    assert len(events) == 2


def test_a_listener_that_raises_at_the_last_event_is_in_the_answer():
    house = text_house()

    def late(event: RequestEvent) -> None:
        if event.output is not None:
            raise LookupError("late")

    entry = house.session.submit(house.request(), on_event=late)
    early = house.session.submit(house.request(), on_event=raising(LookupError("early")))
    for _ in range(2):
        with pytest.raises(LookupError):
            house.rest()
    house.rest()
    for each, error in ((entry, "late"), (early, "early")):
        assert each.answer is not None
        assert each.answer.error == f"on_event: LookupError: {error}"


def test_a_broken_turn_loses_no_event(monkeypatch: pytest.MonkeyPatch):
    house, events = text_house(), list[RequestEvent]()
    asked = house.request(n=2, temperature=1.0, max_tokens=6, logprobs=1)
    house.session.submit(asked, on_event=events.append)
    broken = 0

    def late_in_a_turn(loop: Loop) -> None:
        nonlocal broken
        if loop.lifecycle.has_news:
            broken += 1
            raise ZeroDivisionError("late in a turn")

    monkeypatch.setattr(Loop, "_give_back", late_in_a_turn)
    while house.session.has_work:
        with contextlib.suppress(ZeroDivisionError):
            house.session.step()
    assert broken > 1
    check(events, asked.id)


def test_a_stream_of_several_choices():
    house = text_house()
    stream = house.stream(n=3, temperature=1.0, max_tokens=8, logprobs=2)
    chunks = list(stream)
    output = check(chunks, stream._entry.request.id)
    assert [len(choice.token_ids) for choice in output.choices] == [8] * 3
    assert list(stream) == []
    house.rest()


def test_a_slow_reader_gets_what_has_come_of_a_choice_as_one_chunk():
    house = text_house()
    stream = house.stream(n=2, temperature=1.0, max_tokens=12, logprobs=0, prompt_logprobs=0)
    assert all(map(exact, house.generate(4, max_tokens=20)))
    house.rest()
    chunks = list(stream)
    assert sorted(chunk.choice for chunk in chunks) == [0, 1]
    check(chunks, stream._entry.request.id)


def test_a_backlog_gives_the_choice_with_the_answer_last():
    answer = RequestOutput("r", None, [1], [])
    told = [
        RequestEvent("a", [1], choice=1),
        RequestEvent("b", [2], choice=0),
        RequestEvent("c", [3], "stop", choice=1),
        RequestEvent("", [4], "length", answer, choice=0),
    ]
    left = list(told)
    backlog = Backlog(lambda: left.pop(0))
    assert backlog.pop() == RequestEvent("ac", [1, 3], "stop", choice=1)
    assert backlog.pop() == RequestEvent("b", [2, 4], "length", answer, choice=0)
    assert backlog.pop() is None


def test_events_of_a_choice_as_one():
    first, second = TokenLogprobs(-1.0, ()), TokenLogprobs(-2.0, ())
    events = [RequestEvent("a", [1], logprobs=[first]), RequestEvent("b", [2], logprobs=[second])]
    assert merged(events) == RequestEvent("ab", [1, 2], logprobs=[first, second])
    assert merged(events[:1]) is events[0]


@pytest.mark.parametrize("whole", [False, True])
def test_the_first_event_of_a_choice_has_the_log_probabilities_of_its_prompt(whole: bool):
    house, events = text_house(), list[RequestEvent]()
    asked = house.request(n=3, temperature=1.0, max_tokens=6, logprobs=1, prompt_logprobs=2)
    house.session.submit(asked, on_event=events.append, whole=whole)
    house.rest()
    output = check(events, asked.id)
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    tokens = [each.token for each in output.prompt_logprobs if each is not None]
    assert tokens == [*asked.prompt_token_ids[1:]]
    assert merged(events).prompt_logprobs == output.prompt_logprobs


def test_no_choice_is_told_before_the_log_probabilities_of_the_prompt_are_known():
    house, events = text_house(), list[RequestEvent]()
    asked = house.request(n=2, temperature=1.0, prompt_logprobs=0)
    entry = house.session.submit(asked, on_event=events.append)
    first, second = entry.sequences
    second.output += [1]
    assert entry.event_of(second) is None
    assert first.prompt_scores is not None
    first.prompt_scores.add(Scores(*np.zeros((2, 2)), *np.zeros((2, 2, 0))))
    event = entry.event_of(second)
    assert event is not None and event.prompt_logprobs is not None
    house.session.abort(asked.id)
    house.rest()
    told = {event.choice: event.prompt_logprobs for event in events}
    assert told == {0: event.prompt_logprobs, 1: None}


def test_a_choice_that_ends_before_its_prompt_is_known_is_told_with_it():
    house = text_house()
    asked = house.request(n=3, temperature=1.0, prompt_logprobs=0)
    entry = Entry(asked, None, house.deployment.coordinator.sequences_of(asked))
    first, second, third = entry.sequences
    for each in (first, second):
        each.output += [1]
    second.move(State.FINISHED)
    second.finish_reason = "length"
    assert [*entry.events_of(second), *entry.events_of(third)] == []
    assert first.prompt_scores is not None
    first.prompt_scores.add(Scores(*np.zeros((2, 2)), *np.zeros((2, 2, 0))))
    told = [(event.choice, event.finish_reason) for event in entry.events_of(first)]
    assert told == [(0, None), (1, "length")]
    assert [*entry.events_of(first), *entry.events_of(second)] == []


@pytest.mark.parametrize("own_thread", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_events_are_whole_whatever_happens(seed: int, own_thread: bool):
    """Preemptions, aborts, slow devices and broken turns, by chance."""
    draw, mishap = random.Random(seed), random.Random(seed)
    house = House(
        make_text=lambda request: Crosses(), stages=(1, 2), pages=(14, 14), max_delay=3, prefills=2
    )
    coordinator: Any = house.deployment.coordinator
    step = coordinator.step

    def stumble() -> Any:
        news = step()
        if mishap.random() < 0.02:
            coordinator.start_over(InterruptedError("by chance"))
        return news

    coordinator.step = stumble
    if own_thread:
        house.session.start()
    heard: list[tuple[str, list[RequestEvent]]] = []
    for _ in range(25):
        params = {"n": draw.randint(1, 3), "temperature": 1.0, "max_tokens": draw.randint(1, 20)}
        asked = house.request(
            **params, logprobs=draw.choice([None, 1]), prompt_logprobs=draw.choice([None, 1])
        )
        events: list[RequestEvent] = []
        heard.append((asked.id, events))
        house.session.submit(asked, on_event=events.append, patient=True, whole=draw.random() < 0.2)
        if draw.random() < 0.3:
            house.session.abort(draw.choice(heard)[0])
        for _ in range(draw.randint(0, 3)):
            house.session.step()
    house.rest()
    house.session.close()
    reasons = {check(events, request_id).finish_reason for request_id, events in heard}
    assert reasons >= {"length", "abort"}
