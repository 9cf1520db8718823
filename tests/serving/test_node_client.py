"""OpenAI's Node client against a server over a fake backend. It needs node, and the package where
node finds it: `npm install --no-save openai@7.59.0` in the root of the repository."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fake_backend import LENGTH, TEXT, FakeBackend, Served

SCRIPT = Path(__file__).with_name("node_client.mjs")
TEMPLATE = "{{ tools }}<tool_call>{% for message in messages %}{{ message.content }}{% endfor %}"
HELLO = [{"role": "user", "content": "hello"}]
CHAT: dict[str, Any] = {"model": "fake", "messages": HELLO}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "über"}}\n</tool_call>'

Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> FakeBackend:
    return FakeBackend(tmp_path_factory.mktemp("node"), template=TEMPLATE)


@pytest.fixture(scope="module")
def node(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    program = shutil.which("node")
    if program is None:
        pytest.skip("node is not installed")
    if not any((folder / "node_modules/openai").is_dir() for folder in SCRIPT.parents):
        pytest.skip("the npm package openai is not installed: npm install --no-save openai@7.59.0")
    server: Served = request.getfixturevalue("server")
    command = [program, str(SCRIPT), f"{server.url}/v1"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(20) == 0


@pytest.fixture
def ask(node: subprocess.Popen[str], server: Served, backend: FakeBackend) -> Iterator[Ask]:
    """Let the client ask; returns what it was told, or its error."""
    assert node.stdin is not None and node.stdout is not None
    stdin, stdout = node.stdin, node.stdout

    def ask(name: str, body: Any = None) -> dict[str, Any]:
        stdin.write(json.dumps({"name": name, "body": body}) + "\n")
        stdin.flush()
        found: dict[str, Any] = json.loads(stdout.readline())
        return found

    yield ask
    server.until(lambda: not server.front.answers)
    backend.reset()


def test_chats(ask: Ask):
    made = ask("chat", {**CHAT, "logprobs": True, "top_logprobs": 2})["told"]
    [choice] = made["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (TEXT, "stop")
    assert len(choice["logprobs"]["content"]) == made["usage"]["completion_tokens"] == LENGTH
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}, "logprobs": True}
    *chunks, last = ask("chat", body)["told"]
    assert "".join(each["choices"][0]["delta"]["content"] for each in chunks) == TEXT
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert sum(len(each["choices"][0]["logprobs"]["content"]) for each in chunks) == LENGTH
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == LENGTH


def test_the_stream_helper(ask: Ask):
    made = ask("helper", {**CHAT, "n": 2, "temperature": 1, "logprobs": True})["told"]
    assert [each["message"]["content"] for each in made["choices"]] == [TEXT, TEXT + "!"]
    assert len(made["choices"][1]["logprobs"]["content"]) == LENGTH + 1


def test_completions(ask: Ask):
    body = {"model": "fake", "prompt": ["a", "b"], "n": 2, "max_tokens": 99, "logprobs": 1}
    texts = [TEXT, TEXT + "!"] * 2
    choices = ask("completion", body)["told"]["choices"]
    assert [each["text"] for each in choices] == texts
    assert choices[0]["logprobs"]["token_logprobs"] == [-0.5] * LENGTH
    found = [""] * 4
    for chunk in ask("completion", {**body, "stream": True})["told"]:
        [choice] = chunk["choices"]
        found[choice["index"]] += choice["text"]
    assert found == texts


def test_responses_and_models(ask: Ask):
    made = ask("response", {"model": "fake", "input": "hello"})["told"]
    assert (made["output_text"], made["status"]) == (TEXT, "completed")
    assert [each["id"] for each in ask("models")["told"]] == ["fake"]


def test_calls_of_tools(ask: Ask, backend: FakeBackend):
    backend.text = f"I look.\n{CALL}{CALL}"
    for name in ("chat", "helper"):
        [choice] = ask(name, {**CHAT, "tools": TOOLS})["told"]["choices"]
        message = choice["message"]
        assert (message["content"], choice["finish_reason"]) == ("I look.", "tool_calls")
        functions = [each["function"] for each in message["tool_calls"]]
        for function in functions:
            assert (function["name"], function["arguments"]) == ("look", '{"at": "über"}')
        assert len(functions) == 2 and all(each["id"] for each in message["tool_calls"])
    tools = [{"type": "function", "name": "look", "parameters": {}, "strict": False}]
    made = ask("response", {"model": "fake", "input": "hello", "tools": tools})["told"]
    items = [(item["type"], item.get("arguments")) for item in made["output"]]
    assert items == [("message", None), *[("function_call", '{"at": "über"}')] * 2]


def test_errors_have_the_clients_classes(ask: Ask, backend: FakeBackend):
    error = ask("chat", {**CHAT, "temperature": -1})["error"]
    assert (error["name"], error["param"]) == ("BadRequestError", "temperature")
    error = ask("chat", {**CHAT, "model": "other"})["error"]
    assert (error["name"], error["code"]) == ("NotFoundError", "model_not_found")
    backend.full = True
    assert ask("chat", CHAT)["error"]["name"] == "RateLimitError"
    backend.full, backend.fails_after = False, 3
    assert ask("chat", CHAT)["error"]["name"] == "InternalServerError"
    for how in ("chat", "helper"):
        error = ask(how, {**CHAT, "stream": True})["error"]
        assert "the request failed" in error["message"] and "secret" not in error["message"]


def test_sixty_four_at_once(ask: Ask, server: Served):
    bodies = [
        {"model": "fake", "messages": [{"role": "user", "content": str(number)}]}
        for number in range(64)
    ]
    told = ask("many", bodies)["told"]
    assert [each["choices"][0]["message"]["content"] for each in told] == [TEXT] * 64
    server.until(lambda: not server.front.requests)
