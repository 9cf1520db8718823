"""Reasoning and calls of tools in `/v1/responses`, with the official client."""

from typing import Any

import pytest
from openai import OpenAI

from pdjax.serving.responses_input import turns_of
from tests.helpers.fake_backend import FakeBackend
from tests.serving.test_tools import CALLED, FIND, LOOK, TEMPLATE

pytestmark = pytest.mark.smoke

TOOLS: Any = [
    {"type": "function", "name": name, "parameters": {"type": "object"}, "strict": False}
    for name in ("look", "find")
]
ANSWER = f"<think>\nHm.\n</think>\n\nI look.\n{LOOK}\n{FIND}"
KINDS = ["reasoning", "message", "function_call", "function_call"]


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> FakeBackend:
    return FakeBackend(tmp_path_factory.mktemp("items"), ANSWER, TEMPLATE)


def ask(client: OpenAI, **how: Any) -> Any:
    how = {"model": "fake", "input": "hello", "tools": TOOLS, **how}
    made = client.responses.create(**how)
    return made if how.get("stream") else type(made).model_validate(made.to_dict())


def calls_of(response: Any) -> list[tuple[str, str]]:
    items = [item for item in response.output if item.type == "function_call"]
    return [(item.name, item.arguments) for item in items]


def test_an_answer_has_items(client: OpenAI, backend: FakeBackend):
    made = ask(client)
    assert [item.type for item in made.output] == KINDS
    assert {item.status for item in made.output} == {made.status} == {"completed"}
    assert (made.output[0].content[0].text, made.output_text) == ("Hm.", "I look.")
    assert calls_of(made) == CALLED
    assert [tool.name for tool in made.tools] == ["look", "find"]
    assert calls_of(ask(client, parallel_tool_calls=False)) == CALLED[:1]
    assert ask(client, tool_choice="none").output_text == f"I look.\n{LOOK}\n{FIND}"


def test_a_call_may_be_forced(client: OpenAI, backend: FakeBackend):
    backend.text = '{"name": "find", "arguments": {"at": "über"}}'
    made = ask(client, tool_choice={"type": "function", "name": "find"})
    assert calls_of(made) == CALLED[1:] and made.output_text == ""
    assert backend.asked.params.guide is not None


def test_items_are_streamed(client: OpenAI):
    events = [type(each).model_validate(each.to_dict()) for each in ask(client, stream=True)]
    last = events[-1].response
    assert [item.type for item in last.output] == KINDS and calls_of(last) == CALLED
    assert [each.sequence_number for each in events] == [*range(len(events))]
    done = [each.item for each in events if each.type == "response.output_item.done"]
    assert [item.to_dict() for item in done] == [item.to_dict() for item in last.output]
    for index, name in enumerate(("reasoning_text", "output_text", "function_call_arguments")):
        of_item = [e for e in events if getattr(e, "output_index", None) == index]
        names = [each.type.removeprefix("response.") for each in of_item]
        part = "part" in " ".join(names)
        assert names[: 1 + part] == ["output_item.added", "content_part.added"][: 1 + part]
        deltas = "".join(each.delta for each in of_item if each.type.endswith(f"{name}.delta"))
        [end] = [each for each in of_item if each.type.endswith(f"{name}.done")]
        assert deltas == (end.arguments if index == 2 else end.text)


def test_the_stream_helper_makes_the_whole_of_it(client: OpenAI):
    with client.responses.stream(model="fake", input="hello", tools=TOOLS) as stream:
        stream.until_done()
        made = stream.get_final_response()
    assert calls_of(made) == CALLED and made.output_text == "I look."


def test_an_answer_that_is_cut(client: OpenAI, backend: FakeBackend):
    backend.text = LOOK
    made = ask(client, max_output_tokens=40)
    assert (made.output_text, made.output[0].status) == (LOOK[:40], "incomplete")
    last = list(ask(client, max_output_tokens=50, stream=True))[-1].response
    assert [(item.type, item.status) for item in last.output] == [("function_call", "incomplete")]
    backend.text = "<think>Hm"
    [item] = ask(client, max_output_tokens=8).output
    assert (item.type, item.content[0].text, item.status) == ("reasoning", "H", "incomplete")


def test_a_conversation_goes_on_with_the_results(client: OpenAI, backend: FakeBackend):
    items = [item.to_dict() for item in ask(client).output]
    first, second = (item["call_id"] for item in items[2:])
    outputs = [
        {"type": "function_call_output", "call_id": first, "output": "one"},
        {
            "type": "function_call_output",
            "call_id": second,
            "output": [{"type": "input_text", "text": "two"}],
        },
    ]
    ask(client, input=[{"role": "user", "content": "hello"}, *items, *outputs])
    calls = f'{{"at": "über"}}{first}{{"at": "über"}}{second}'
    assert backend.prompt.endswith(
        f"<user>hello<assistant>I look.<think>Hm.</think>{calls}<tool>one<tool>two<assistant>"
    )


def test_turns_of_items_that_lack_some():
    call = {"type": "function_call", "name": "look", "call_id": "a", "arguments": ""}
    tool_calls = [{"id": "a", "type": "function", "function": {"name": "look", "arguments": {}}}]
    reasoning: dict[str, Any] = {"type": "reasoning", "summary": []}
    assert turns_of([{"role": "user", "content": "x"}, reasoning, call, call]) == [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": tool_calls * 2},
    ]
    reasoning["content"] = [{"type": "reasoning_text", "text": "Hm."}]
    assert turns_of([call, reasoning, call, reasoning]) == [
        {"role": "assistant", "content": "", "tool_calls": tool_calls},
        {"role": "assistant", "content": "", "tool_calls": tool_calls, "reasoning": "Hm."},
    ]
