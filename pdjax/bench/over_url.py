"""A workload to a server with OpenAI's API: streamed completions of prompts of token ids."""

import asyncio
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pdjax.bench.http import Answer, Exchange, HttpClient, HttpError
from pdjax.bench.record import Played, Record, ended_badly, never_came
from pdjax.core.clock import Clock, WallClock, unix_ns
from pdjax.formats.strict_json import dumps
from pdjax.host.handoff.accounting import TransferTotals
from pdjax.host.metrics.request import RequestMetrics
from pdjax.workloads.arrival import Arrival
from pdjax.workloads.schedule import Call, Schedule

LEAD_S = 0.2
"""Seconds before the first arrival, and before each one in which its request is written."""
_NO_ROOM = (429, 503)
"""What a server answers that has no room."""
_SAYS = "the server says:"


@dataclass(frozen=True)
class Target:
    """A server.

    Attributes:
      url: as http://127.0.0.1:8000; /v1 is added.
      model: what it calls its model; None asks it.
      vocab_size: prompts are of token ids below it.
      api_key: is sent as OpenAI's clients do; None sends none.
      timeout_s: seconds after which an answer that has not ended has failed.
    """

    url: str
    model: str | None = None
    vocab_size: int = 1000
    api_key: str | None = None
    timeout_s: float = 1800.0


def play(target: Target, arrivals: list[Arrival], salt: str = "") -> Played:
    """Serve a workload to its end; see `in_process.play`. Moments of tokens are those at which
    their chunks are read here. Where a conversation goes on, token ids are asked for. Priority,
    deadline and SLO are sent as pdjax's server takes them.

    Raises:
      ValueError: the server has no model, the URL is none, or a request has a label other than
        `user`, which an API of completions has no field for.
      OSError: it cannot be reached.
    """
    return asyncio.run(_Player(target, arrivals, salt).play())


def model_of(target: Target) -> str:
    """What a server calls its first model.

    Raises:
      ValueError: it names none, or the URL is none.
      OSError: it cannot be reached.
    """

    async def ask() -> Answer:
        client = _client(target, WallClock())
        try:
            return (await client.ask(client.request("GET", "/v1/models"))).answer
        finally:
            await client.close()

    try:
        answer = asyncio.run(ask())
        return str(json.loads(answer.body)["data"][0]["id"])
    except (HttpError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"url={target.url!r}: names no model at /v1/models: {error}") from error


def _client(target: Target, clock: Clock) -> HttpClient:
    key = {"authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    return HttpClient(target.url, clock.now, {"accept": "text/event-stream", **key})


class _Player:
    def __init__(self, target: Target, arrivals: list[Arrival], salt: str) -> None:
        for label in (label for each in arrivals for label in each.labels if label != "user"):
            raise ValueError(f"labels[{label!r}]: must be `user`, as a server takes no other")
        self._target, self._clock = target, WallClock()
        self._client = _client(target, self._clock)
        self._vocab_size = target.vocab_size
        self._arrivals, self._salt = arrivals, salt
        self._goes_on = any(each.continues for each in arrivals)
        self._records: dict[int, Record] = {}
        self._ended: asyncio.Queue[None] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._broken: BaseException | None = None  # an error of this client itself

    async def play(self) -> Played:
        start = self._clock.now() + LEAD_S
        unix_start_ns = unix_ns() + round(LEAD_S * 1e9)
        self._schedule = Schedule(self._arrivals, self._vocab_size, self._salt, start=start)
        tasks = self._tasks
        try:
            while len(self._records) < self._schedule.count:
                for call in self._schedule.take(self._clock.now() + LEAD_S):
                    tasks.add(task := asyncio.create_task(self._serve(call)))
                    task.add_done_callback(self._done)
                moment = self._schedule.next_moment
                wait = None if moment is None else moment - LEAD_S - self._clock.now()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._ended.get(), wait)
                if self._broken is not None:
                    raise self._broken
        finally:
            for task in list(tasks):
                task.cancel()
            await self._client.close()
        records = [self._records[number] for number in sorted(self._records)]
        return Played(start, unix_start_ns, records, {}, knows_cache=False)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._broken = task.exception()
        self._ended.put_nowait(None)

    async def _serve(self, call: Call) -> None:
        """Ask when it is due, and take the answer."""
        request, exchange = self._request(call), Exchange()
        # An overloaded client is late, too: what it sends late has waited since it was due.
        seconds = self._target.timeout_s
        within = max(0.0, call.moment - self._clock.now()) + seconds
        bound = asyncio.timeout(within)
        try:
            async with bound:
                await self._client.ask(request, exchange, until=call.moment)
            read = read_answer(exchange.answer)
        except (HttpError, OSError) as error:
            # A socket's ETIMEDOUT is a TimeoutError, too, which the bound has not raised.
            told = f"{type(error).__name__}: {error}"
            if bound.expired():
                told = f"timeout: no end within {seconds:g} s"
            read = _cut_off(exchange.answer, told)
        self._take(call, exchange.sent, read)

    def _take(self, call: Call, sent: float | None, read: "Read") -> None:
        schedule, number = self._schedule, call.number
        metrics = RequestMetrics(
            call.id,
            call.moment,
            (),
            tuple(read.times),
            len(call.prompt),
            0,
            TransferTotals(),
            read.reason,
        )
        if not metrics.completed:
            if not read.times:
                record = ended_badly(
                    number, call.arrival, call.moment, sent, read.reason, read.error or ""
                )
            else:
                record = Record(number, call.arrival, metrics, sent, read.error)
            self._records[number] = record
            for lost in never_came(schedule.broken(call), call, self._clock.now()):
                self._records[lost.number] = lost
            return
        self._records[number] = Record(number, call.arrival, metrics, sent)
        answer = read.token_ids if len(read.token_ids) == len(read.times) else None
        schedule.ended(call, self._clock.now(), answer, len(read.times))

    def _request(self, call: Call) -> bytes:
        asked: dict[str, Any] = {
            "model": self._target.model,
            "prompt": call.prompt,
            "max_tokens": call.arrival.output,
            "temperature": 0,
            "ignore_eos": True,
            "seed": call.number,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        if self._goes_on:
            asked["return_token_ids"] = True
        asked |= _wishes(call.arrival)
        return self._client.request("POST", "/v1/completions", dumps(asked).encode())


def _wishes(arrival: Arrival) -> dict[str, Any]:
    """The fields of the body for what policies go by; those that are not given are left out, as
    other servers may refuse them."""
    wishes: dict[str, Any] = dict(arrival.labels)
    if arrival.priority:
        wishes["priority"] = arrival.priority
    if arrival.deadline is not None:
        wishes["deadline"] = arrival.deadline
    if arrival.slo is not None:
        wishes["slo"] = {k: v for k, v in asdict(arrival.slo).items() if v is not None}
    return wishes


@dataclass(frozen=True)
class Read:
    """A streamed completion, read.

    Attributes:
      times: of each token. Tokens of one chunk have one moment. Where chunks do not say how many
        they have, the tokens are dealt to them evenly.
      token_ids: where they were told.
      reason: as in `RequestMetrics`.
      error: why it failed or was shed.
    """

    times: list[float]
    token_ids: list[int]
    reason: str
    error: str | None = None


def read_answer(answer: Answer) -> Read:
    """Read the events of an answer."""
    if answer.status != 200:
        told = " ".join(answer.body[:500].decode("utf-8", "replace").split())
        reason = "shed" if answer.status in _NO_ROOM else "error"
        return Read([], [], reason, f"HTTP {answer.status}: {told}")
    moments, counts, ids = list[float](), list[int](), list[int]()
    whole, reason, done = 0, "", False
    for moment, data in _events(answer):
        if data == b"[DONE]":
            done = True
            continue
        try:
            event = json.loads(data)
            if "error" in event:
                raise ValueError(f"{_SAYS} {event['error']}")
            used = (event.get("usage") or {}).get("completion_tokens")
            choices = event.get("choices") or []
            whole = whole if used is None else int(used)
            if not choices:
                continue
            new = choices[0].get("token_ids") or []
            ids += new
            if new or choices[0].get("text") or used is not None:
                moments.append(moment)
                counts.append(len(ids) if new else (whole if used is not None else -1))
            reason = choices[0].get("finish_reason") or reason
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            times = _times(moments, counts, whole)
            return Read(times, ids, "error", f"{type(error).__name__}: {error}")
    times = _times(moments, counts, whole)
    if not done or reason not in ("stop", "length") or not times:
        error_text = f"the stream ended with finish_reason={reason!r} after {len(times)} tokens"
        return Read(times, ids, "abort" if done and reason == "abort" else "error", error_text)
    return Read(times, ids, reason)


def _cut_off(answer: Answer, error: str) -> Read:
    """Read the beginning of an answer that an error has ended; what the server says of the error
    takes its place."""
    if answer.status != 200:
        return Read([], [], "error", error)
    begun = read_answer(answer)
    told = begun.error if begun.error and _SAYS in begun.error else error
    return Read(begun.times, begun.token_ids, "error", told)


def _events(answer: Answer) -> list[tuple[float, bytes]]:
    """Moment and data of each server-sent event. Its moment is that of its last byte."""
    found, rest = list[tuple[float, bytes]](), b""
    for moment, part in answer.parts:
        *lines, rest = (rest + part).split(b"\n")
        found += [(moment, line[5:].strip()) for line in lines if line.startswith(b"data:")]
    return found


def _times(moments: list[float], counts: list[int], whole: int) -> list[float]:
    """The moment of each token.

    Args:
      moments: of chunks.
      counts: tokens up to each chunk; -1 where that is not told.
      whole: tokens of all chunks; 0 where that is not told.
    """
    if not moments:
        return []
    if -1 in counts:
        total = max(whole, len(moments))
        counts = np.linspace(0, total, len(moments) + 1)[1:].round().astype(int).tolist()
    steps = np.diff(np.asarray(counts), prepend=0)
    return np.repeat(np.asarray(moments), np.maximum(steps, 0)).tolist()
