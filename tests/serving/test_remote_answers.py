"""Answers whose text is made in a front, beside those of one process: the same tokens, texts and
account of both."""

import asyncio
import itertools
import random
import socket
import threading
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from pdjax import async_llm
from pdjax.async_llm import AsyncLLM
from pdjax.core.guide import Guide
from pdjax.core.outputs import RequestEvent, RequestOutput
from pdjax.core.request import QueueFull, SamplingParams
from pdjax.serving.async_backend import AsyncBackend
from pdjax.serving.backend import Ask, Backend
from pdjax.serving.processes import outbox, portions
from pdjax.serving.processes.frames import Frames
from pdjax.serving.processes.messages import Piece
from pdjax.serving.processes.remote_backend import RemoteBackend
from pdjax.session import Closed
from tests.helpers.fake_backend import PATIENCE
from tests.helpers.text_llm import TextLLM, linked, remote


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> TextLLM:
    llm = TextLLM()
    monkeypatch.setattr(async_llm, "LLM", lambda *_, **__: llm)
    return llm


def asks(chance: random.Random, count: int) -> list[Ask]:
    """Asks with all features: choices, stops of all kinds, log-probabilities, whole answers."""
    found = []
    for _ in range(count):
        stops = ["".join(chr(chance.randrange(33, 97)) for _ in range(chance.randint(1, 2)))]
        stops += [chr(each) for each in chance.sample(range(33, 97), 6)]
        params = SamplingParams(
            temperature=1.0,
            seed=chance.randrange(1 << 40),
            n=chance.choice([1, 1, 2, 3]),
            max_tokens=chance.randint(1, 30),
            stop=chance.choice([[], stops, stops]),
            stop_token_ids=chance.choice([[], [5, 6, 7, 8]]),
            logprobs=chance.choice([None, 0, 2]),
            prompt_logprobs=chance.choice([None, None, 1]),
            ignore_eos=chance.random() < 0.5,
        )
        prompt = tuple(chance.randrange(1, 97) for _ in range(chance.randint(1, 9)))
        found.append(Ask(prompt, params, whole=chance.random() < 0.4))
    return found


def account(output: RequestOutput) -> dict[str, Any]:
    """What an answer says, but for names and moments."""
    choices = [
        replace(each, metrics=(each.metrics.output_tokens, each.metrics.finish_reason))
        for each in output.choices
    ]
    return {"choices": choices, "prompt": output.prompt_token_ids, "of": output.prompt_logprobs}


async def answered(backend: Backend, ask: Ask) -> dict[str, Any]:
    """An answer, read to its end; what its events say is what it says as a whole."""
    answer, events = await backend.submit(ask), list[RequestEvent]()
    async for event in answer:
        events.append(event)
    output = events[-1].output
    assert output is not None and await answer.outcome is output
    for number, choice in enumerate(output.choices):
        own = [event for event in events if event.choice == number]
        assert "".join(event.text for event in own) == choice.text
        assert [token for event in own for token in event.token_ids] == choice.token_ids
        if choice.logprobs is not None:
            assert [each for event in own for each in event.logprobs or ()] == choice.logprobs
        assert [event.finish_reason for event in own][:-1] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == choice.finish_reason
        assert own[-1].stop_reason == choice.stop_reason
        assert not ask.whole or len(own) == 1
        assert own[0].prompt_logprobs == output.prompt_logprobs
        assert all(event.prompt_logprobs is None for event in own[1:])
    return account(output)


@pytest.mark.parametrize("portion", [portions.PORTION, 3])
def test_answers_are_those_of_one_process(
    portion: int, llm: TextLLM, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(portions, "PORTION", portion)
    wanted = asks(random.Random(7), 30)

    async def both() -> tuple[list[Any], list[Any]]:
        async with remote(llm) as backend:
            apart = [await answered(backend, ask) for ask in wanted]
        here = AsyncBackend(AsyncLLM())
        together = [await answered(here, ask) for ask in wanted]
        await here.close()
        return apart, together

    apart, together = asyncio.run(both())
    assert apart == together
    reasons = [each.stop_reason for one in apart for each in one["choices"]]
    assert sum(isinstance(each, str) for each in reasons) > 5
    llm.house.check()


def test_a_long_piece_lets_others_and_the_event_loop_go_on():
    taken, turns = list[tuple[int, int]](), list[int]()

    async def take() -> None:
        loop = asyncio.get_running_loop()
        taking = portions.Portions(lambda piece: taken.append((piece[0], len(piece[2]))))
        for number in (1, 2):
            taking.take((number, 0, [7] * 600, None, ("length", None, None, [])))
        taking.take((3, 0, [7], None, None))
        taking.take((1, 1, [7] * 2, None, None))
        while len(taken) < 8:
            turns.append(len(taken))
            loop.call_soon(lambda: None)
            await asyncio.sleep(0)

    asyncio.run(take())
    assert taken == [(3, 1), (1, 256), (2, 256), (1, 256), (2, 256), (1, 88), (2, 88), (1, 2)]
    assert turns == [*range(1, 8)]


def test_a_stop_that_is_found_late_hides_what_came_after_it(llm: TextLLM):
    """The engines have ended by themselves before they hear of it."""

    async def ask() -> RequestOutput:
        async with remote(llm) as backend:
            params = SamplingParams(temperature=1.0, seed=3, max_tokens=30, ignore_eos=True)
            whole = await (await backend.submit(Ask((1, 2), params, whole=True))).outcome
            stop = next(each for each in whole.text[3:] if each not in whole.text[:3])
            llm.session.stop_soon = lambda stop: None
            answer = await backend.submit(Ask((1, 2), replace(params, stop=stop)))
            output = await answer.outcome
            assert output.text == whole.text[: whole.text.index(stop)]
            return output

    output = asyncio.run(ask())
    [choice] = output.choices
    assert (choice.finish_reason, len(choice.token_ids)) == ("stop", len(choice.text) + 1)
    assert choice.metrics.output_tokens == len(choice.token_ids)
    llm.house.check()


def test_what_is_refused_is_refused_there(llm: TextLLM):
    params = SamplingParams(temperature=0.0, max_tokens=30)

    async def ask() -> None:
        async with remote(llm) as backend:
            for prompt, message in (((), "prompt_token_ids"), ((500,), "not a token id")):
                with pytest.raises(ValueError, match=message):
                    await backend.submit(Ask(prompt, params))
            llm.coordinator.pause(llm.house.deployment.decode[0].id)
            held = [await backend.submit(Ask((1,), params)) for _ in range(2)]
            crowd = [backend.submit(Ask((1,), params)) for _ in range(20)]
            found = await asyncio.gather(*crowd, return_exceptions=True)
            held += [each for each in found if not isinstance(each, BaseException)]
            refused = [each for each in found if isinstance(each, BaseException)]
            assert all(isinstance(each, QueueFull) for each in refused)
            assert "max_waiting=4" in str(refused[-1])
            for answer in held:
                answer.close()
            for answer in held:
                assert (await answer.outcome).finish_reason == "abort"
            llm.coordinator.resume(llm.house.deployment.decode[0].id)
            assert await backend.report() == {"live": 0}
            llm.session.submit = None  # a fault of the server
            with pytest.raises(RuntimeError, match="failed: TypeError"):
                await backend.submit(Ask((1,), params))
            with pytest.raises(RuntimeError, match="OSError"):
                await backend.recent()

    asyncio.run(asyncio.wait_for(ask(), PATIENCE))
    llm.house.check()


def test_a_guide_is_compiled_beside_the_event_loop(llm: TextLLM, monkeypatch: pytest.MonkeyPatch):
    plain = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    guided = replace(plain, guide=Guide.regex("a*"))
    of_ids, compiled, threads = llm.requests.of_ids, threading.Event(), list[int]()

    def slow(prompt: Any, params: SamplingParams, options: Any) -> Any:
        if params.guide is not None:
            threads.append(threading.get_ident())
            assert compiled.wait(PATIENCE)
            params = plain
        return of_ids(prompt, params, options)

    monkeypatch.setattr(llm.requests, "of_ids", slow)

    async def ask() -> None:
        async with remote(llm) as backend:
            waits = asyncio.ensure_future(backend.submit(Ask((1,), guided)))
            leaves = asyncio.ensure_future(backend.submit(Ask((2,), guided)))
            assert (await answered(backend, Ask((3,), plain)))["prompt"] == [3]
            leaves.cancel()
            await asyncio.wait([leaves])
            await backend.report()  # so that the engines know
            compiled.set()
            answer = await waits
            assert len((await answer.outcome).token_ids) == 3
            while backend._answers:
                await asyncio.sleep(0.005)

    asyncio.run(asyncio.wait_for(ask(), PATIENCE))
    [thread] = threads  # the one that leaves is not compiled
    assert thread != threading.get_ident()
    llm.house.check()


def test_requests_whose_guides_are_compiled_count_as_those_that_wait(
    llm: TextLLM, monkeypatch: pytest.MonkeyPatch
):
    plain = SamplingParams(max_tokens=3, ignore_eos=True)
    guided = replace(plain, guide=Guide.regex("a*"), n=2)
    of_ids, compiled = llm.requests.of_ids, threading.Event()

    def slow(prompt: Any, params: SamplingParams, options: Any) -> Any:
        if params.guide is not None:
            assert compiled.wait(PATIENCE)
        return of_ids(prompt, replace(plain, n=params.n), options)

    monkeypatch.setattr(llm.requests, "of_ids", slow)

    async def ask() -> None:
        async with remote(llm) as backend:
            waits = [asyncio.ensure_future(backend.submit(Ask((1,), guided))) for _ in range(2)]
            await backend.report()  # the engines know of them then
            with pytest.raises(QueueFull, match="4 sequences wait already; n=2 more"):
                await backend.submit(Ask((2,), guided))
            assert (await answered(backend, Ask((3,), plain)))["prompt"] == [3]
            compiled.set()
            for answer in await asyncio.gather(*waits):
                await answer.outcome
            answer = await backend.submit(Ask((2,), guided))
            await answer.outcome

    asyncio.run(asyncio.wait_for(ask(), PATIENCE))


def test_a_storm_of_readers_that_leave_leaves_nothing_behind(llm: TextLLM):
    chance = random.Random(11)

    async def read(backend: RemoteBackend, ask: Ask) -> None:
        with suppress(QueueFull):
            answer = await backend.submit(ask)
            for _ in range(chance.randrange(8)):
                await anext(answer, None)
            answer.close()
            assert [event async for event in answer] == []

    async def storm() -> None:
        async with remote(llm) as backend:
            reading = [asyncio.ensure_future(read(backend, each)) for each in asks(chance, 80)]
            for task in chance.sample(reading, 20):
                await asyncio.sleep(chance.uniform(0, 0.005))
                task.cancel()
            for end in await asyncio.gather(*reading, return_exceptions=True):
                assert end is None or isinstance(end, asyncio.CancelledError), end
            while backend._answers or llm.session.book.entries:
                await asyncio.sleep(0.005)

    asyncio.run(asyncio.wait_for(storm(), PATIENCE))
    llm.house.check()


def test_a_front_that_reads_nothing_is_kept_a_bounded_backlog(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(outbox, "MOST_UNSENT", 2000)
    pieces = list[Piece]()

    async def tell() -> None:
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        box: outbox.Outbox
        sender = Frames(ours, print, lambda: None, drained=lambda: box.flush())
        box = outbox.Outbox(sender)
        for token in range(20_000):
            box.add(token % 2, RequestEvent("", [token], choice=token % 3))
            box.flush()
            assert sender.unsent < 4000
        last = RequestOutput("r", None, [1], [])
        box.add(0, RequestEvent("", [20_000], "stop", last))
        reader = Frames(theirs, lambda news: pieces.extend(news.pieces), sender.close)
        box.flush()
        while sum(len(token_ids) for _, _, token_ids, _, _ in pieces) < 20_001:
            await asyncio.sleep(0.001)
        reader.close()
        sender.close()

    asyncio.run(asyncio.wait_for(tell(), PATIENCE))
    assert len(pieces) < 1500
    for number, choice in itertools.product(range(2), range(3)):
        told = [token for piece in pieces if piece[:2] == (number, choice) for token in piece[2]]
        assert told == [
            t for t in range(20_001) if (t % 2, t % 3 * (t < 20_000)) == (number, choice)
        ]


def test_a_link_that_breaks_aborts_what_is_open_and_ends_the_readers(llm: TextLLM):
    params = SamplingParams(temperature=0.0, max_tokens=30)

    async def ask() -> None:
        link, backend, frames = linked(llm)
        llm.coordinator.pause(llm.house.deployment.decode[0].id)
        answer = await backend.submit(Ask((1,), params))
        link.close()
        async for _ in answer:
            pass
        with pytest.raises(Closed):
            await backend.submit(Ask((1,), params))
        while llm.session.book.entries:
            await asyncio.sleep(0.005)
        frames.close()

    asyncio.run(asyncio.wait_for(ask(), PATIENCE))
    llm.session.stop()
    llm.house.check()
