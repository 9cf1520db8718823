"""`pdjax serve`: what it refuses, and its life from the first line to a signal."""

import json
import logging
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from pdjax import async_llm
from pdjax.async_llm import AsyncLLM
from pdjax.cli import serve
from pdjax.flags import status
from pdjax.serving.server import listening_socket, url_of
from tests.helpers.front_processes import PATIENCE
from tests.helpers.text_llm import TextLLM

LOGGERS = ("pdjax", "uvicorn", "uvicorn.error", "opentelemetry")


@pytest.fixture
def restored_logs() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in LOGGERS]
    kept = [(each.handlers, each.propagate, each.level, each.filters[:]) for each in loggers]
    yield
    for logger, (handlers, propagate, level, filters) in zip(loggers, kept, strict=True):
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers, logger.propagate, logger.level = handlers, propagate, level
        logger.filters = filters


def run(*words: str) -> int:
    return status(serve.serve, serve.COMMAND.values, serve.USAGE, ["pdjax serve", *words])


@pytest.mark.usefixtures("restored_logs")
@pytest.mark.parametrize("processes", [0, 1])
def test_it_serves_until_a_signal(
    processes: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    loaded = threading.Event()
    llm = TextLLM()

    class Slow(AsyncLLM):
        def __init__(self, config: Any) -> None:
            loaded.wait(PATIENCE)
            super().__init__(config)

    monkeypatch.setattr(async_llm, "LLM", lambda *_, **__: llm)
    monkeypatch.setattr(async_llm, "AsyncLLM", Slow)
    with listening_socket("127.0.0.1", 0) as free:
        url = url_of(free)
    answers: list[int] = []

    def ask() -> None:
        transport = httpx2.HTTPTransport(retries=5)
        with httpx2.Client(base_url=url, timeout=PATIENCE, transport=transport) as client:
            try:
                answers.append(client.get("/ready").status_code)
                answers.append(client.get("/health").status_code)
                loaded.set()
                while client.get("/ready").status_code != 200:
                    time.sleep(0.01)
                body = {"prompt": "X", "max_tokens": 2}
                answers.append(client.post("/v1/completions", json=body).status_code)
            finally:
                loaded.set()
                os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    words = ("--served_model_name=mine", "--drain_s=5", f"--front_processes={processes}")
    code = run(f"--port={url.rpartition(':')[2]}", *words)
    asking.join(PATIENCE)
    assert (code, answers) == (0, [503, 200, 200])
    said = capfd.readouterr()
    assert re.search(rf"pdjax serve: mine at {url}/v1\n", said.out)
    lines = [json.loads(line) for line in said.err.splitlines() if line.startswith("{")]
    events = [line["event"] for line in lines]
    assert "ready" in events and events[-1] == "draining"
    llm.house.check()


@pytest.mark.usefixtures("restored_logs")
@pytest.mark.parametrize("processes", [0, 1])
def test_a_signal_while_the_model_loads_leaves_nothing(
    processes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before, seen = signal.getsignal(signal.SIGTERM), list[int]()

    class Loading(AsyncLLM):
        def __init__(self, config: Any) -> None:
            seen.append(len(list(tmp_path.iterdir())))
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(async_llm, "AsyncLLM", Loading)
    with pytest.raises(SystemExit) as end:
        run("--port=0", f"--front_processes={processes}")
    assert end.value.code == 128 + signal.SIGTERM
    assert seen == [processes] and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port=70000"], "port=70000: must be in"),
        (["--host=no.such.host.invalid"], "host='no.such.host.invalid'"),
        (["--drain_s=-1"], "drain_s=-1.0: must be"),
        (["--max_body_mb=0"], "max_body=0: must be"),
        (["--api_keys_file=/nowhere"], "/nowhere"),
        (["--tls_cert_file=/nowhere"], "tls_cert_file='/nowhere'"),
        (["--front_processes=-1"], "front_processes"),
        (["--cors_origins=example.org"], "cors_origins: 'example.org' must be"),
        (["--otlp_endpoint=http://here:70000"], "with a port in [1, 65536)"),
    ],
)
def test_a_wrong_flag_is_told_before_anything_is_loaded(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert run(*words) == 2
    assert message in capsys.readouterr().err


def test_a_port_in_use_is_told(capsys: pytest.CaptureFixture[str]):
    with listening_socket("127.0.0.1", 0) as found:
        found.listen()
        port = found.getsockname()[1]
        assert run(f"--port={port}") == 2
    assert f"port={port}" in capsys.readouterr().err
