"""HTTP in processes of its own: what clients find, and what becomes of it when a front dies."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest

from pdjax import async_llm
from pdjax.core.request import SamplingParams
from pdjax.serving.front import Settings
from pdjax.serving.keys import ApiKey, digest_of
from pdjax.serving.processes import front_process, fronts
from pdjax.serving.processes.server_folder import PREFIX, ServerFolder
from tests.helpers.deployment import LAYOUT
from tests.helpers.fakes import expected_output
from tests.helpers.front_processes import PATIENCE, FrontedServer, fronted
from tests.helpers.text_llm import TOKENIZER, TextLLM

KEYS = {"authorization": "Bearer secret"}
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 20, "ignore_eos": True}
LONG = {"prompt": [1], **GREEDY, "stream": True}


@pytest.fixture(scope="module")
def server() -> Iterator[FrontedServer]:
    with pytest.MonkeyPatch.context() as patch:
        llm = TextLLM()
        patch.setattr(async_llm, "LLM", lambda *_, **__: llm)
        patch.setattr(fronts, "RESTART_S", 0.01)
        settings = Settings(api_keys=(ApiKey("me", digest_of("secret")),), drain_s=20.0)
        with fronted(llm, settings=settings) as at:
            yield at
            check_drain(at)
        llm.house.check()


def check_drain(server: FrontedServer) -> None:
    """Answers may finish, while what comes is refused. It is a part of the fixture, since no test
    can come after it."""
    engine = server.llm.house.deployment.decode[0].id
    server.llm.coordinator.pause(engine)
    how: dict[str, Any] = {"base_url": server.url, "headers": KEYS, "timeout": PATIENCE}
    with (
        httpx2.Client(**how) as client,
        client.stream("POST", "/v1/completions", json=LONG) as response,
    ):
        stream = response.iter_raw()
        next(stream)
        server.call(server.fronts.end)
        until(lambda: len(pids_of(server)) == 1)
        with httpx2.Client(**how) as other:
            assert other.get("/ready").status_code == 503
            assert other.get("/health").status_code == 200
        server.llm.coordinator.resume(engine)
        server.llm.coordinator.wake()
        assert b"".join(stream).endswith(b"data: [DONE]\n\n")


@pytest.fixture
def clients(server: FrontedServer) -> Iterator[list[httpx2.Client]]:
    """Two clients, each with one connection: of the two fronts, each has one."""
    until(lambda: connections_of(server) == [0, 0])
    with ExitStack() as held:
        limits = httpx2.Limits(max_connections=1)
        how: dict[str, Any] = {"headers": KEYS, "timeout": PATIENCE, "limits": limits}
        made = [held.enter_context(httpx2.Client(base_url=server.url, **how)) for _ in range(2)]
        for client in made:
            assert client.get("/ready").text == "ok\n"
        assert connections_of(server) == [1, 1]
        yield made


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)


def metrics_of(client: httpx2.Client) -> dict[str, float]:
    lines = re.findall(r"^(\w+:\w+(?:\{.*\})?) (\S+)$", client.get("/metrics").text, re.M)
    return {name: float(value) for name, value in lines}


def pids_of(server: FrontedServer) -> list[int]:
    fronts = server.report()["fronts"].values()
    return [front["pid"] for front in fronts if front["pid"] is not None]


def connections_of(server: FrontedServer) -> list[int]:
    return [front["connections"] for front in server.report()["fronts"].values()]


def open_answers(client: httpx2.Client) -> tuple[int, int]:
    """How many answers are under way, and the sum over the fronts."""
    state = client.get("/engines").json()
    return state["open_answers"], sum(each["open_answers"] for each in state["fronts"].values())


def is_live(server: FrontedServer) -> bool:
    return bool(server.llm.coordinator.loop.lifecycle.live)


def test_both_fronts_answer_as_the_model_does(server: FrontedServer, clients: list[httpx2.Client]):
    params = SamplingParams(**GREEDY)
    request = server.llm.requests.of_prompt([1, 2, 3], params, {}).request
    [sequence] = server.llm.coordinator.sequences_of(request)
    text = TOKENIZER.decode(expected_output(sequence, LAYOUT.num_layers))
    body = {"prompt": [1, 2, 3], **GREEDY}
    before = metrics_of(clients[0])
    for client in clients:
        whole = client.post("/v1/completions", json=body).json()
        assert whole["choices"][0]["text"] == text
        assert whole["usage"]["completion_tokens"] == 20
        streamed = client.post("/v1/completions", json={**body, "stream": True}).text
        chunks = [json.loads(line[6:]) for line in streamed.split("\n\n")[:-2]]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
        stop = text[5]
        cut = client.post("/v1/completions", json={**body, "stop": stop}).json()
        assert cut["choices"][0]["text"] == text[: text.index(stop)]
        assert cut["choices"][0]["stop_reason"] == stop
        assert cut["usage"]["completion_tokens"] == text.index(stop) + 1
    until(lambda: not is_live(server))
    for client in clients:
        after = metrics_of(client)
        name = 'pdjax:request_success_total{finished_reason="%s",model_name="bytes"}'
        assert after[name % "length"] - before.get(name % "length", 0) == 4
        assert after[name % "stop"] - before.get(name % "stop", 0) == 2
        tokens = 'pdjax:generation_tokens_total{model_name="bytes"}'
        assert after[tokens] - before[tokens] == 4 * 20 + 2 * (text.index(stop) + 1)


def test_bad_requests_are_refused_as_ever(server: FrontedServer, clients: list[httpx2.Client]):
    for client in clients:
        wrong = client.post("/v1/completions", json={"prompt": [500]})
        assert wrong.status_code == 400 and "500" in wrong.json()["error"]["message"]
        assert client.get("/v1/models", headers={"authorization": ""}).status_code == 401
    assert set(server.report()["fronts"]) == {"0", "1"}


def test_each_front_has_the_page_and_its_data(clients: list[httpx2.Client]):
    asked = {"prompt": [1, 2, 3, 4], **GREEDY}
    assert clients[0].post("/v1/completions", json=asked).status_code == 200
    for client in clients:
        assert client.get("/", headers={"authorization": ""}).status_code == 200
        assert client.get("/requests", headers={"authorization": ""}).status_code == 401
        *_, told = client.get("/requests").json()["requests"]
        assert (told["input_len"], told["output_len"], told["finish_reason"]) == (4, 20, "length")


def test_a_client_that_leaves_frees_what_it_held(
    server: FrontedServer, clients: list[httpx2.Client]
):
    engine = server.llm.house.deployment.decode[0].id
    server.llm.coordinator.pause(engine)
    with clients[0].stream("POST", "/v1/completions", json=LONG) as one:
        stream = one.iter_raw()  # dropped, it would close the response
        next(stream)
        until(lambda: open_answers(clients[1]) == (1, 1))
    until(lambda: not server.llm.session.book.entries)
    server.llm.coordinator.resume(engine)
    name = 'pdjax:request_success_total{finished_reason="abort",model_name="bytes"}'
    until(lambda: metrics_of(clients[1]).get(name) == 1)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux has it")
def test_fronts_have_no_jax(server: FrontedServer):
    for front in server.report()["fronts"].values():
        loaded = Path(f"/proc/{front['pid']}/maps").read_text()
        assert "pydantic_core" in loaded and "jaxlib" not in loaded


def hang(server: FrontedServer, pid: int) -> None:
    """Stop the first front, and let the time pass in which it is missed; meanwhile the other one
    takes what comes."""
    os.kill(pid, signal.SIGSTOP)
    [slot, _] = server.fronts._slots
    slot.beats = fronts.LATE_BEATS - 1
    until(lambda: not server.report()["fronts"]["0"]["is_ready"])
    for _ in range(3):
        with httpx2.Client(base_url=server.url, timeout=PATIENCE) as client:
            assert client.get("/ready").status_code == 200
    slot.beats = fronts.MOST_BEATS


@pytest.mark.parametrize("hangs", [False, True])
def test_a_front_that_dies_or_hangs_takes_its_own_answers_and_comes_again(
    hangs: bool,
    server: FrontedServer,
    clients: list[httpx2.Client],
    caplog: pytest.LogCaptureFixture,
):
    engine = server.llm.house.deployment.decode[0].id
    before = metrics_of(clients[0])
    pids = pids_of(server)
    server.llm.coordinator.pause(engine)
    with ExitStack() as held:
        streams = []
        for client in clients:
            response = held.enter_context(client.stream("POST", "/v1/completions", json=LONG))
            streams.append(response.iter_raw())
            next(streams[-1])
        if hangs:
            hang(server, pids[0])
        else:
            server.call(server.fronts.kill, 0)
        until(lambda: server.report()["open_answers"] == 1)
        server.llm.coordinator.resume(engine)
        server.llm.coordinator.wake()
        ends = []
        for stream in streams:
            try:
                ends.append(b"".join(stream).endswith(b"data: [DONE]\n\n"))
            except httpx2.TransportError:
                ends.append(False)
        assert sorted(ends) == [False, True]
    until(lambda: all(front["is_ready"] for front in server.report()["fronts"].values()))
    now = pids_of(server)
    assert now[0] != pids[0] and now[1] == pids[1]
    with httpx2.Client(base_url=server.url, headers=KEYS, timeout=PATIENCE) as client:
        after = metrics_of(client)
    tokens = 'pdjax:generation_tokens_total{model_name="bytes"}'
    assert after[tokens] >= before[tokens] + 20  # those of the front that died are not forgotten
    losses = 'pdjax:front_losses_total{front="0",model_name="bytes"}'
    assert after[losses] == before[losses] + 1
    told = [each.msg for each in caplog.records]
    assert "front_died" in told and ("front_hangs" in told) == hangs


def test_a_front_that_was_late_is_dealt_connections_again(server: FrontedServer):
    [pid, _] = pids_of(server)
    os.kill(pid, signal.SIGSTOP)
    server.fronts._slots[0].beats = fronts.LATE_BEATS - 1
    until(lambda: not server.report()["fronts"]["0"]["is_ready"])
    os.kill(pid, signal.SIGCONT)
    until(lambda: server.report()["fronts"]["0"]["is_ready"])
    assert pids_of(server)[0] == pid


def test_a_process_may_take_its_time_to_end_and_another_to_be_made(
    server: FrontedServer, monkeypatch: pytest.MonkeyPatch
):
    before, tries = pids_of(server), list[int]()
    make, ending = server.fronts._process, server.fronts._slots[1].process
    assert ending is not None
    answered, end = threading.Event(), ending.end

    def slow() -> int:
        assert answered.wait(PATIENCE)  # the event loop, which is asked for a report
        return end()

    def process() -> Any:
        tries.append(1)
        if len(tries) == 1:
            raise OSError(errno.EAGAIN, "no more processes")
        return make()

    monkeypatch.setattr(server.fronts, "_process", process)
    monkeypatch.setattr(ending, "end", slow)
    server.call(server.fronts.kill, 1)
    until(lambda: server.report()["fronts"]["1"]["pid"] is None)
    answered.set()
    until(lambda: len(tries) == 2)
    until(lambda: all(front["is_ready"] for front in server.report()["fronts"].values()))
    assert pids_of(server)[1] != before[1]


@pytest.mark.parametrize(
    ("patches", "said"),
    [
        ([(front_process, "MAIN", "no_such_module")], "no_such_module"),
        ([(fronts, "START_BEATS", 1), (fronts, "BEAT_S", 0.01)], "front_hangs"),
    ],
)
def test_fronts_that_never_start_end_the_server(
    patches: list[Any],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
):
    llm = TextLLM()
    monkeypatch.setattr(async_llm, "LLM", lambda *_, **__: llm)
    for patch in (*patches, (fronts, "RESTART_S", 0.01)):
        monkeypatch.setattr(*patch)
    with fronted(llm, count=1) as at:
        until(lambda: isinstance(at.error, ChildProcessError))
    assert "3 times" in str(at.error)
    assert (capfd.readouterr().err + caplog.text).count(said) == 3


def test_lines_of_several_processes_are_not_torn():
    code = "from pdjax.serving import logs; logs.set_up('info', shared=True, front=%d)\n"
    code += "for i in range(40):\n    logs.event('x', text='y' * 30_000 + '\\n', path='/')"
    ours, theirs = os.pipe()
    with os.fdopen(ours, "rb") as lines:
        writing = [
            subprocess.Popen([sys.executable, "-c", code % number], stderr=theirs)
            for number in range(2)
        ]
        os.close(theirs)
        found = [(json.loads(line), len(line)) for line in lines]
    assert sorted(told["front"] for told, _ in found) == [0] * 40 + [1] * 40
    assert all(told["path"] == "/" and told["text"].endswith("y\n") for told, _ in found)
    assert {size for _, size in found} == {4096}
    assert [process.wait() for process in writing] == [0, 0]


def test_a_folder_whose_owner_is_gone_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lives, dies = ServerFolder(), ServerFolder()
    (dies.path / "metrics").mkdir()
    (elsewhere := tmp_path / "elsewhere").mkdir()
    others = [tmp_path / f"{PREFIX}{name}" for name in ("link", "file", "begun")]
    others[0].symlink_to(elsewhere)
    others[1].touch()
    others[2].mkdir()
    os.close(dies._lock)  # as the system does for a process that is killed
    third = ServerFolder()
    assert not dies.path.exists() and lives.path.exists() and elsewhere.exists()
    assert all(other.exists() for other in others)
    third.close()
    lives.close()
    lives.close()
    assert sorted(tmp_path.iterdir()) == sorted([elsewhere, *others])
