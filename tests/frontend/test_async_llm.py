"""AsyncLLM over fakes: what an asyncio program gets, cancels, drops, reads slowly, or leaves behind
in a loop that has been closed."""

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from pdjax import async_llm
from pdjax.async_llm import AsyncLLM
from pdjax.async_stream import AsyncStream, LoopMailbox
from pdjax.core.outputs import RequestEvent
from pdjax.core.request import QueueFull, SamplingParams
from pdjax.session import Closed
from tests.frontend.test_events import check
from tests.helpers.house import PATIENCE, House, text_house
from tests.helpers.text_llm import TextLLM

pytestmark = pytest.mark.smoke

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
THREE = SamplingParams(n=3, temperature=1.0, max_tokens=6, ignore_eos=True, logprobs=2)


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> House:
    house = text_house()
    llm = TextLLM(house, tokenizer=None)
    monkeypatch.setattr(async_llm, "LLM", lambda *_, **__: llm)
    return house


def run(house: House, program: Callable[[AsyncLLM], Coroutine[Any, Any, None]]) -> None:
    """A program with its LLM, which is closed at its end and has lost nothing then."""

    async def whole() -> None:
        async with AsyncLLM() as llm:
            await asyncio.wait_for(program(llm), PATIENCE)
        with pytest.raises(Closed):
            await llm.generate([1])
        await llm.close()

    asyncio.run(whole())
    house.check()


async def read(stream: AsyncStream) -> list[RequestEvent]:
    return [chunk async for chunk in stream]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_streams_side_by_side_have_every_token_of_every_choice(house: House):
    async def program(llm: AsyncLLM) -> None:
        streams = [await llm.stream([1 + i, 2], THREE if i == 1 else LONG) for i in range(2)]
        for stream, chunks in zip(streams, await asyncio.gather(*map(read, streams)), strict=True):
            assert stream.request_id is not None
            check(chunks, stream.request_id)
        assert await read(streams[0]) == []

    run(house, program)


def test_a_stream_needs_no_await(house: House):
    async def program(llm: AsyncLLM) -> None:
        tokens = []
        async for chunk in llm.stream([1, 2, 3], GREEDY):
            tokens += chunk.token_ids
        [output] = await llm.generate([1, 2, 3], GREEDY)
        assert tokens == output.token_ids and len(tokens) == 6

    run(house, program)


def test_whole_answers_come_in_order_whatever_the_queue_holds(house: House):
    async def program(llm: AsyncLLM) -> None:
        each = [GREEDY, LONG] * 10
        prompts = [[1 + i, 2, 3] for i in range(20)]
        outputs = await llm.generate(prompts, each)
        assert [output.prompt_token_ids for output in outputs] == prompts
        assert [len(output.token_ids) for output in outputs] == [6, 30] * 10
        [several] = await llm.generate([1, 2], THREE)
        assert [len(choice.token_ids) for choice in several.choices] == [6] * 3
        assert await llm.generate([]) == []

    run(house, program)
    assert threading.active_count() < 20, "no thread a request"


def test_what_cannot_be_served_is_refused(house: House):
    async def program(llm: AsyncLLM) -> None:
        with pytest.raises(ValueError, match="prompt_token_ids: 500 is not a token id"):
            await llm.generate([[1], [500]])
        with pytest.raises(ValueError, match=r"chat: model.source='bytes' has no tokenizer"):
            await llm.chat([{"role": "user", "content": "a"}])
        with pytest.raises(ValueError, match="has no tokenizer; give token ids"):
            await llm.stream("text")
        with pytest.raises(ValueError, match="has no tokenizer; give token ids"):
            await llm.stream_chat([{"role": "user", "content": "a"}])
        high: Any = "high"
        with pytest.raises(ValueError, match="priority='high': must be an integer"):
            await llm.stream([1], priority=high)
        assert not house.session.book.entries
        house.session.stop()  # so that the queue stays full
        streams = [await llm.stream([1], GREEDY) for _ in range(4)]
        with pytest.raises(QueueFull):
            await llm.stream([1], GREEDY)
        house.session.start()
        for chunks in await asyncio.gather(*map(read, streams)):
            assert sum(len(chunk.token_ids) for chunk in chunks) == 6

    run(house, program)


def test_a_task_that_is_cancelled_aborts_its_requests_and_no_others(house: House):
    async def program(llm: AsyncLLM) -> None:
        async def stop_in(task: asyncio.Task[Any], entries: int) -> None:
            await until(lambda: len(house.session.book.entries) == entries)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        neighbour = await llm.stream([5, 6], LONG)
        await stop_in(asyncio.create_task(read(llm.stream([1, 2], LONG))), 2)
        await stop_in(asyncio.create_task(llm.generate([[3], [4], [5]], LONG)), 4)
        await until(lambda: len(house.session.book.entries) <= 1)
        assert len([t for chunk in await read(neighbour) for t in chunk.token_ids]) == 30

    slow_house(house)
    run(house, program)


def slow_house(house: House) -> None:
    """Turns that leave the event loop time, so that a test comes to its point before they end."""
    coordinator: Any = house.deployment.coordinator
    step, nap = coordinator.step, threading.Event()

    def slow() -> Any:
        nap.wait(0.002)
        return step()

    coordinator.step = slow


@pytest.mark.parametrize("how", ["close", "drop", "async with", "timeout"])
def test_a_stream_that_is_left_is_aborted(house: House, how: str):
    async def program(llm: AsyncLLM) -> None:
        stream = await llm.stream([1, 2], LONG)
        assert (await anext(stream)).token_ids
        if how == "close":
            await stream.aclose()
            assert await read(stream) == []
        elif how == "drop":
            del stream
            gc.collect()
        elif how == "timeout":
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(read(stream), 0.01)
        else:
            async with stream:
                pass
        await until(lambda: not house.session.book.entries)

    slow_house(house)
    run(house, program)
    assert not house.session._errors
    [metrics] = house.deployment.recorder.requests()
    assert metrics.finish_reason == "abort" and metrics.output_tokens < 30


def test_abort_ends_a_stream_with_its_reason(house: House):
    async def program(llm: AsyncLLM) -> None:
        stream = await llm.stream([1, 2], LONG)
        await anext(stream)
        assert stream.request_id is not None
        llm.abort(stream.request_id)
        *_, last = await read(stream)
        assert last.finish_reason == "abort" and last.output is not None

    slow_house(house)
    run(house, program)


def test_a_slow_reader_delays_nobody(house: House):
    async def program(llm: AsyncLLM) -> None:
        slow = await llm.stream([1, 2], LONG)
        for i in range(10):
            assert len((await llm.generate([1 + i], LONG))[0].token_ids) == 30
        chunks = await read(slow)
        assert len(chunks) == 1 and len(chunks[0].token_ids) == 30

    run(house, program)


def test_several_readers_share_a_stream(house: House):
    async def program(llm: AsyncLLM) -> None:
        stream = llm.stream([1, 2], LONG)
        each = await asyncio.gather(*(read(stream) for _ in range(4)))
        assert (
            len([token for chunks in each for chunk in chunks for token in chunk.token_ids]) == 30
        )

    run(house, program)


def test_the_loop_is_woken_once_for_all_streams_of_a_turn(house: House):
    calls = [0]

    async def program(llm: AsyncLLM) -> None:
        loop: Any = asyncio.get_running_loop()
        inner = loop.call_soon_threadsafe

        def counted(*args: Any, **how: Any) -> Any:
            calls[0] += threading.current_thread().name == "pdjax coordinator"
            return inner(*args, **how)

        loop.call_soon_threadsafe = counted
        streams = [await llm.stream([1 + i], LONG) for i in range(2)]
        await asyncio.gather(*map(read, streams))

    run(house, program)
    assert 0 < calls[0] <= house.session._turns
    assert calls[0] < 2 * 30, "fewer than tokens"


def test_loops_of_two_threads_may_begin_at_once(house: House, monkeypatch: pytest.MonkeyPatch):
    made: list[LoopMailbox] = []

    async def program(llm: AsyncLLM) -> None:
        def in_the_other_thread() -> None:
            asyncio.run(first_stream())

        async def first_stream() -> None:
            llm.stream([1, 2, 3])

        class Mailbox(LoopMailbox):
            """While the first one is made, another loop's is."""

            def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
                super().__init__(loop)
                made.append(self)
                if len(made) == 1:
                    thread = threading.Thread(target=in_the_other_thread)
                    thread.start()
                    thread.join(PATIENCE)

        monkeypatch.setattr(async_llm, "LoopMailbox", Mailbox)
        llm.stream([1, 2, 3])
        assert len(made) == 2
        assert set(llm._mailboxes.values()) == set(made), "events for the other would never come"

    run(house, program)


def test_a_loop_that_is_closed_hurts_nobody(house: House):
    slow_house(house)
    llm = AsyncLLM()
    kept: list[AsyncStream] = []

    async def leave() -> None:
        for i in range(2):
            kept.append(await llm.stream([1 + i], LONG))
            await anext(kept[-1])

    asyncio.run(leave())

    async def again() -> None:
        [output] = await llm.generate([1, 2], LONG)
        assert len(output.token_ids) == 30
        await until(lambda: not house.session.book.entries)
        await llm.close()

    asyncio.run(asyncio.wait_for(again(), PATIENCE))
    reasons = sorted(str(each.finish_reason) for each in house.deployment.recorder.requests())
    assert reasons == ["abort", "abort", "length"]
    house.check()


def test_closing_ends_every_stream(house: House):
    async def program(llm: AsyncLLM) -> None:
        streams = [await llm.stream([1 + i], LONG) for i in range(3)]
        await llm.close()
        for stream in streams:
            *_, last = await read(stream)
            assert last.finish_reason == "abort"

    slow_house(house)
    run(house, program)


class SlowToMake:
    """Makes the LLM of these tests once it may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may, self.made, self._make = threading.Event(), 0, vars(async_llm)["LLM"]
        monkeypatch.setattr(async_llm, "LLM", self)

    def __call__(self, *args: Any, **how: Any) -> Any:
        assert self.may.wait(PATIENCE)
        self.made += 1
        return self._make(*args, **how)


def test_the_event_loop_goes_on_while_an_llm_is_made(house: House, monkeypatch: Any):
    slow = SlowToMake(monkeypatch)

    async def program() -> None:
        making = asyncio.create_task(AsyncLLM.create("a config"))
        await asyncio.sleep(0)
        slow.may.set()
        async with await making as llm:
            [output] = await llm.generate([1, 2], GREEDY)
        assert len(output.token_ids) == 6

    asyncio.run(asyncio.wait_for(program(), PATIENCE))
    house.check()


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_made_for_nobody_is_closed(house: House, monkeypatch: Any, fails: bool):
    slow = SlowToMake(monkeypatch)
    if fails:
        monkeypatch.setattr(house.session, "start", lambda: [][0])

    async def program() -> None:
        making = asyncio.create_task(AsyncLLM.create())
        await asyncio.sleep(0.01)
        making.cancel()
        with pytest.raises(asyncio.CancelledError):
            await making
        assert not slow.made
        slow.may.set()

    asyncio.run(asyncio.wait_for(program(), PATIENCE))
    assert slow.made
    for thread in threading.enumerate():
        if thread.name == "pdjax close":
            thread.join(PATIENCE)
    assert house.session._closed != fails


def test_what_goes_wrong_while_an_llm_is_made_is_raised(monkeypatch: Any):
    def refuse(*_: Any, **how: Any) -> None:
        raise ValueError(f"backend={how['backend']!r}: allowed are device, sim")

    monkeypatch.setattr(async_llm, "LLM", refuse)
    with pytest.raises(ValueError, match="backend='none': allowed are device, sim"):
        asyncio.run(AsyncLLM.create(backend="none"))


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert "pdjax coordinator" not in {thread.name for thread in threading.enumerate()}
