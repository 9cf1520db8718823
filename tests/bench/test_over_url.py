"""A workload to a server: what its answers become, in time and in error."""

import asyncio
import errno
import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pdjax.bench.http import Answer, Exchange, HttpClient
from pdjax.bench.over_url import LEAD_S, Read, Target, model_of, play, read_answer
from pdjax.bench.record import record_json
from pdjax.bench.results import Chips, run_results
from pdjax.core.slo import SLO
from pdjax.workloads.arrival import Arrival
from pdjax.workloads.synthetic import regular
from tests.bench.test_command import results
from tests.helpers.fake_backend import LENGTH, FakeBackend, Served, served


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> FakeBackend:
    return FakeBackend(tmp_path_factory.mktemp("fake"))


@pytest.fixture(scope="module")
def server(backend: FakeBackend) -> Iterator[Served]:
    with served(lambda: backend) as at:
        yield at


@pytest.fixture(autouse=True)
def fresh(backend: FakeBackend) -> Iterator[None]:
    backend.reset()
    yield
    backend.reset()


def target(server: Served, **more) -> Target:
    return Target(server.url, "fake", vocab_size=200, **more)


def test_moments_are_those_of_chunks(server: Served, backend: FakeBackend):
    backend.token_s = 0.01
    played = play(target(server), regular(0.05, [(9, 6)] * 4))
    assert [record.metrics.finish_reason for record in played.records] == ["length"] * 4
    for record in played.records:
        metrics, sent = record.metrics, record.sent
        assert sent is not None and metrics.arrival <= sent
        assert metrics.output_tokens == 6 and metrics.prompt_tokens == 9
        assert metrics.ttft is not None and metrics.ttft >= 0.01
        assert metrics.e2e is not None and metrics.e2e >= 0.06
        assert metrics.tpot == pytest.approx(0.01, abs=0.02)
    assert [r.metrics.arrival - played.start for r in played.records] == pytest.approx(
        [0.0, 0.05, 0.1, 0.15]
    )


def test_a_request_comes_when_it_is_due_whatever_has_become_of_those_before(
    server: Served, backend: FakeBackend
):
    backend.token_s = 0.05
    played = play(target(server), regular(0.01, [(9, 6)] * 4))
    sent = [record.sent for record in played.records]
    ends = [record.metrics.token_times[-1] for record in played.records]
    assert max(each for each in sent if each is not None) < min(ends)


def test_a_conversation_goes_on_with_the_answer_that_was_given(
    server: Served, backend: FakeBackend
):
    first = Arrival(0.0, 5, 7, id="a")
    later = Arrival(0.01, 3, 2, id="b", after="a", continues=True)
    played = play(target(server), [first, later])
    asked, then = (answer.ask.prompt_token_ids for answer in backend.answers)
    assert then[:12] == (*asked, *backend.reply(0)[:7]) and len(then) == 15
    one, two = (record.metrics for record in played.records)
    assert two.arrival >= one.token_times[-1] + 0.01 and two.prompt_tokens == 15


def test_what_policies_go_by_is_sent(server: Served, backend: FakeBackend):
    slo = SLO(ttft=3.0, tpot=2.0)
    wish = Arrival(0.0, 5, 2, priority=3, deadline=60.0, slo=slo, labels={"user": "ann"})
    played = play(target(server), [wish, Arrival(0.1, 5, 2)])
    assert all(record.metrics.completed for record in played.records)
    first, second = (answer.ask for answer in backend.answers)
    assert (first.priority, first.deadline, first.slo) == (3, 60.0, slo)
    assert first.labels["user"] == "ann" and "user" not in second.labels
    assert (second.priority, second.deadline, second.slo) == (0, None, None)
    with pytest.raises(ValueError, match=r"labels\['tenant'\]: must be `user`"):
        play(target(server), [Arrival(0.0, 5, 2, labels={"tenant": "a"})])


def test_a_server_without_room_sheds(server: Served, backend: FakeBackend):
    backend.full = True
    played = play(target(server), [Arrival(0.0, 5, 2, id="a"), Arrival(0, 5, 2, "b", after="a")])
    shed, lost = played.records
    assert shed.metrics.shed and shed.error is not None and shed.error.startswith("HTTP 429")
    assert lost.metrics.failed and lost.sent is None
    assert lost.error is not None and lost.error.startswith("never sent: a")


def test_answers_that_break_off_or_are_refused_are_failures(server: Served, backend: FakeBackend):
    backend.fails_after = 3
    [broken] = play(target(server), regular(1.0, [(5, 6)])).records
    assert broken.metrics.failed and broken.metrics.output_tokens >= 2
    assert broken.error and "the server says:" in broken.error, broken.error
    backend.reset()
    [refused] = play(target(server), regular(1.0, [(5000, 6)])).records
    assert refused.metrics.failed and refused.error and "HTTP 400" in refused.error
    backend.token_s = 5.0
    [late] = play(target(server, timeout_s=0.2), regular(1.0, [(5, 6)])).records
    assert late.metrics.failed and late.error == "timeout: no end within 0.2 s"


def test_what_came_before_a_timeout_is_kept():
    """Two tokens come at once, and no other before the bound."""
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 9999\r\n\r\n" + event(used=1) + event(used=2)
    hold = threading.Event()
    with answering(lambda number: answer, hold) as (url, _):
        played = play(Target(url, "x", timeout_s=0.3), regular(1.0, [(5, 6)]))
        hold.set()
    [late] = played.records
    assert late.error == "timeout: no end within 0.3 s" and late.metrics.failed
    assert late.metrics.output_tokens == 2 and late.metrics.ttft is not None
    assert late.sent is not None and late.sent >= late.metrics.arrival
    line = record_json(late, played, "profiling", None)
    assert line["late_ms"] >= 0 and line["metadata"]["request_start_ns"] is not None
    found = run_results(played, None, Chips.of_url(None))
    assert found["max_late_ms"] == line["late_ms"]


def test_a_timeout_before_any_token_keeps_when_it_was_sent(server: Served, backend: FakeBackend):
    backend.token_s = 5.0
    [late] = play(target(server, timeout_s=0.2), regular(1.0, [(5, 6)])).records
    assert late.error == "timeout: no end within 0.2 s"
    assert late.sent is not None and late.metrics.output_tokens == 0


@pytest.mark.parametrize("connected", [True, False])
def test_a_timeout_of_the_socket_is_none_of_the_bound(connected: bool, monkeypatch):
    async def broken(self: HttpClient) -> "Broken":
        if connected:
            return Broken()
        raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")

    class Broken:
        used = False

        async def ask(self, request: bytes, answer: Answer) -> None:
            raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")

    monkeypatch.setattr(HttpClient, "_connect", broken)
    [record] = play(Target("http://127.0.0.1:1", "x"), regular(1.0, [(5, 6)])).records
    assert record.error is not None and "Connection timed out" in record.error
    assert "no end within" not in record.error and record.metrics.failed
    assert record.sent is not None


def test_an_exchange_that_is_cancelled_before_it_is_due_was_not_sent():
    async def cancelled() -> Exchange:
        client, exchange = HttpClient("http://127.0.0.1:1", lambda: 0.0), Exchange()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.ask(b"", exchange, until=60.0), 0.01)
        return exchange

    assert asyncio.run(cancelled()) == Exchange(None, Answer())


def test_unix_stamps_begin_where_the_workload_does(
    server: Served, backend: FakeBackend, monkeypatch
):
    monkeypatch.setattr("pdjax.bench.over_url.unix_ns", lambda: 10**18)
    played = play(target(server), regular(1.0, [(5, 2)]))
    assert played.unix_start_ns == 10**18 + round(LEAD_S * 1e9)
    [record] = played.records
    assert record.sent is not None
    told = record_json(record, played, "profiling", None)["metadata"]["request_start_ns"]
    assert told == played.unix_start_ns + round((record.sent - played.start) * 1e9)


def test_nobody_listens():
    [record] = play(Target("http://127.0.0.1:1", "x"), regular(1.0, [(5, 6)])).records
    assert record.metrics.failed and record.error and "Connect call failed" in record.error
    with pytest.raises(OSError, match="Connect call failed"):
        model_of(Target("http://127.0.0.1:1"))


def test_the_command_drives_a_server(server: Served, tmp_path: Path):
    args = ("--num_prompts=8", "--input_len=20", f"--output_len={LENGTH}", "--request_rate=200")
    goodput = ("--goodput=ttft:10000", "--num_gpu=2", "--vocab_size=200")
    whole, lines = results(tmp_path, f"--url={server.url}", *args, *goodput)
    assert (whole["completed"], whole["failed"]) == (8, 0), whole["errors_by_reason"]
    assert whole["model_id"] == "fake" and whole["endpoint_type"] == "openai"
    assert whole["slo_good"] == whole["slo_total"] == 8
    assert whole["tput_per_gpu"] == pytest.approx(whole["total_token_throughput"] / 2)
    assert whole["config"] is whole["disagg"] is whole["total_cached_tokens"] is None
    assert "engines" not in whole and len(lines) == 9
    starts = [line["metadata"]["request_start_ns"] for line in lines]
    assert all(start > 1.6e18 for start in starts)
    acks = [line["metadata"]["request_ack_ns"] for line in lines]
    assert all(ack > start for ack, start in zip(acks, starts, strict=True))


def test_a_command_finds_no_prompt_of_another_in_a_prefix_cache(
    server: Served, backend: FakeBackend, tmp_path: Path
):
    args = (f"--url={server.url}", "--num_prompts=2", "--input_len=20", "--output_len=2")
    salts = ((), (), ("--salt=a",), ("--salt=a",))
    told = [results(tmp_path, *args, "--vocab_size=200", *salt)[0]["salt"] for salt in salts]
    prompts = [answer.ask.prompt_token_ids for answer in backend.answers]
    first, second, third, fourth = (prompts[3 * i : 3 * i + 3] for i in range(4))
    assert first != second != third == fourth
    assert len(set(told)) == 3 and told[2] == "a"


# Streams made by hand.


def event(text: str = "x", used: int | None = None, ids=None, reason: str | None = None) -> bytes:
    choice = {"text": text, "finish_reason": reason}
    told = {"choices": [choice | ({} if ids is None else {"token_ids": ids})]}
    usage = {} if used is None else {"usage": {"completion_tokens": used}}
    return b"data: " + json.dumps(told | usage).encode() + b"\n\n"


USED = b'data: {"choices": [], "usage": {"completion_tokens": 6}}\n\n'
DONE = b"data: [DONE]\n\n"
END = event("", None, None, "length")


def read(*parts: bytes) -> Read:
    return read_answer(Answer(200, [(float(i), part) for i, part in enumerate(parts, 1)]))


def test_chunks_that_tell_their_usage_have_so_many_tokens():
    found = read(event(used=1), event(used=4), event(used=6), event("", 6, None, "length"), DONE)
    assert found.times == [1, 2, 2, 2, 3, 3] and found.reason == "length"


def test_chunks_that_tell_their_tokens_have_those():
    found = read(event(ids=[7]), event(ids=[8, 9]), event("", 3, [], "stop"), DONE)
    assert (found.times, found.token_ids, found.reason) == ([1, 2, 2], [7, 8, 9], "stop")


def test_tokens_of_chunks_that_tell_nothing_are_dealt_evenly():
    assert read(event(), event(), event(reason="length"), USED, DONE).times == [1, 1, 2, 2, 3, 3]
    assert read(event(), event(reason="length"), DONE).times == [1, 2]


def test_several_events_may_come_in_one_part_and_one_event_in_several():
    whole = event(used=1) + event(used=2)
    found = read(whole[:-9], whole[-9:] + event(used=3), event("", 3, None, "stop") + DONE)
    assert found.times == [1, 2, 2]


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ([event(used=1)], "the stream ended with finish_reason=''"),
        ([event(used=1), DONE], "the stream ended with finish_reason=''"),
        ([event(used=1), event("", 1, None, "length")], "the stream ended"),
        ([END, DONE], "after 0 tokens"),
        ([event(used=1), b'data: {"error": {"message": "no"}}\n\n', DONE], "the server says:"),
        ([b"data: nonsense\n\n"], "JSONDecodeError"),
        ([b"data: [1]\n\n"], "AttributeError"),
    ],
)
def test_streams_that_end_early_have_failed(parts: list[bytes], error: str):
    found = read(*parts)
    assert found.reason == "error" and found.error is not None and error in found.error


# HTTP made by hand.

BODY = event(used=1) + event("", 1, None, "length") + DONE
ANSWERS = {
    "chunked": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    + b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in (BODY[:20], BODY[20:]))
    + b"0\r\n\r\n",
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY),
    "until it closes": b"HTTP/1.0 200 OK\r\n\r\n" + BODY,
    "continued": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"
    + BODY,
}


@contextmanager
def answering(
    answer: Callable[[int], bytes], hold: threading.Event | None = None
) -> Iterator[tuple[str, list[int]]]:
    """A server that reads one request of each connection, gives the answer of its number, waits for
    `hold`, and then closes."""
    seen: list[int] = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            seen.append(len(seen))
            asked = b""
            while b"\r\n\r\n" not in asked:
                asked += self.request.recv(65536)
            self.request.sendall(answer(seen[-1]))
            if hold is not None:
                hold.wait(60)

    socketserver.ThreadingTCPServer.daemon_threads = True
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", seen
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("form", ANSWERS)
def test_every_form_of_a_body_is_read(form: str):
    with answering(lambda number: ANSWERS[form]) as (url, _):
        [record] = play(Target(url, "x"), regular(1.0, [(5, 1)])).records
    assert record.metrics.completed and record.metrics.output_tokens == 1, record.error


@pytest.mark.parametrize("text", [b"", b"nonsense\r\n\r\n", ANSWERS["chunked"][:80]])
def test_what_is_no_answer_is_a_failure(text: bytes):
    with answering(lambda number: text) as (url, _):
        [record] = play(Target(url, "x"), regular(1.0, [(5, 1)])).records
    assert record.metrics.failed and record.error and "cut off" in record.error


def test_a_connection_that_was_closed_while_idle_is_replaced():
    """The server says that it keeps the connection, and closes it."""
    with answering(lambda number: ANSWERS["length"]) as (url, seen):
        found = play(Target(url, "x"), regular(0.15, [(5, 1)] * 3)).records
    assert all(record.metrics.completed for record in found) and len(seen) == 3


@pytest.mark.parametrize("url", ["", "127.0.0.1:80", "ftp://x", "http://", "http://x:y"])
def test_what_is_no_url_is_refused(url: str):
    with pytest.raises(ValueError, match="must be as http://"):
        HttpClient(url, lambda: 0.0)
