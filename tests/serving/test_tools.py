"""Calls of tools and reasoning, as the official client sends and gets them."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from pdjax.core.guide import Guide
from pdjax.serving.errors import ApiError
from pdjax.serving.parsers.answer import AnswerSyntax
from pdjax.serving.parsers.parts import Reasoning, Text
from pdjax.serving.tool_choice import ToolChoice, tool_choice_of
from pdjax.text.byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from pdjax.text.guides import GuideCompiler, TokenGuide
from tests.helpers.fake_backend import FakeBackend
from tests.helpers.http_client import Http, error_of

pytestmark = pytest.mark.smoke

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<tool_call></tool_call>{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{% for call in message.tool_calls or () %}{{ call.function.arguments | tojson }}"
    "{{ call.id }}{% endfor %}{% endfor %}<assistant>{% if thinks %}<think>\n{% endif %}"
)
HELLO: Any = [{"role": "user", "content": "hello"}]
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("look", "find")
]
CALL = '<tool_call>\n{"name": "%s", "arguments": {"at": "über"}}\n</tool_call>'
LOOK, FIND = CALL % "look", CALL % "find"


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> FakeBackend:
    return FakeBackend(tmp_path_factory.mktemp("tools"), template=TEMPLATE)


def ask(client: OpenAI, **how: Any) -> Any:
    how = {"messages": HELLO, "tools": TOOLS} | how
    return client.chat.completions.create(model="fake", **how)


def pairs(message: Any) -> list[tuple[str, str]]:
    return [(each.function.name, each.function.arguments) for each in message.tool_calls or ()]


THINKING: dict[str, Any] = {
    "tools": openai.omit,
    "extra_body": {"chat_template_kwargs": {"thinks": True}},
}
CALLED = [("look", '{"at": "über"}'), ("find", '{"at": "über"}')]


def test_calls_are_parsed_from_an_answer(client: OpenAI, backend: FakeBackend):
    backend.text = f"I look.\n{LOOK}\n{FIND}\n"
    [choice] = ask(client).choices
    assert (choice.message.content, choice.finish_reason) == ("I look.", "tool_calls")
    assert pairs(choice.message) == CALLED
    ids = {each.id for each in choice.message.tool_calls}
    assert len(ids) == 2 and {each.type for each in choice.message.tool_calls} == {"function"}
    [choice] = ask(client, parallel_tool_calls=False).choices
    assert pairs(choice.message) == CALLED[:1]
    backend.text = LOOK
    assert ask(client).choices[0].message.content is None


def test_calls_are_streamed_as_they_come(client: OpenAI, backend: FakeBackend):
    backend.text = f"I look.\n{LOOK}\n{FIND}"
    with client.chat.completions.stream(model="fake", messages=HELLO, tools=TOOLS) as stream:
        events = list(stream)
        choice = stream.get_final_completion().choices[0]
    assert (choice.message.content, choice.finish_reason) == ("I look.", "tool_calls")
    assert pairs(choice.message) == CALLED
    deltas = [e for e in events if e.type == "tool_calls.function.arguments.delta"]
    assert len(deltas) > 10 and deltas[-1].arguments == CALLED[1][1]


def test_a_stream_begins_with_its_role_and_a_content_also_where_it_is_parsed(
    client: OpenAI, backend: FakeBackend
):
    backend.text = f"<think>\nHm.\n</think>\n\n{LOOK}"
    for how in ({}, {"tools": openai.omit, "extra_body": {"return_token_ids": True}}):
        first, *others = ask(client, stream=True, **how)
        assert first.choices[0].delta.to_dict() == {"role": "assistant", "content": ""}
        assert all(each.choices[0].delta.role is None for each in others)


def test_a_conversation_goes_on_with_the_result(client: OpenAI, backend: FakeBackend):
    backend.text = f"<think>\nHm.\n</think>\n\n{LOOK}"
    message = ask(client).choices[0].message
    assert message.reasoning == "Hm."
    [call] = message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    turns = [*HELLO, message.to_dict(), result]
    backend.text = "Found."
    assert ask(client, messages=turns).choices[0].message.content == "Found."
    assert backend.prompt.endswith(
        f'<user>hello<assistant><think>Hm.</think>{{"at": "über"}}{call.id}<tool>done<assistant>'
    )


def test_without_tools_nothing_is_a_call(client: OpenAI, backend: FakeBackend):
    backend.text = LOOK
    for how in ({"tools": openai.omit}, {"tool_choice": "none"}):
        [choice] = ask(client, **how).choices
        assert (choice.message.content, choice.finish_reason) == (LOOK, "stop")
        assert choice.message.tool_calls is None


def schema(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def test_a_call_may_be_forced(client: OpenAI, backend: FakeBackend):
    backend.text = '{"name": "look", "arguments": {"at": "<think>"}}'
    calls = [schema(name, {"type": "object"}) for name in ("look", "find")]
    look: Any = {"type": "function", "function": {"name": "look"}}
    for choice, allowed in (("required", calls), (look, calls[:1])):
        [made] = ask(client, tool_choice=choice, **THINKING | {"tools": TOOLS}).choices
        assert backend.asked.params.guide == Guide.json_schema({"anyOf": allowed})
        assert pairs(made.message) == [("look", '{"at": "<think>"}')]
        assert (made.message.content, made.finish_reason) == (None, "tool_calls")
        chunks = list(ask(client, tool_choice=choice, stream=True))
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
    [made] = ask(client, tool_choice="required", max_tokens=40).choices
    assert (made.message.content, made.finish_reason) == (backend.text[:40], "length")


def test_references_of_tools_lead_to_their_own_schemas():
    def tool(name: str, defines: str) -> dict[str, Any]:
        properties = {
            "a": {"$ref": "#/$defs/D"},
            "b": {"$ref": "#/properties/a"},
            "more": {"$ref": "#"},
        }
        parameters = {"$defs": {"D": {"type": defines}}, "properties": properties}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    guide = tool_choice_of([tool("f", "string"), tool("g", "integer")], "required").guide("args")
    assert guide is not None
    form = GuideCompiler(byte_tokenizer(), VOCAB_SIZE)
    for text, fits in (
        ('{"name": "f", "args": {"a": "x", "b": "y"}}', True),
        ('{"name": "g", "args": {"a": 1, "b": 2, "more": {"a": 3, "more": {}}}}', True),
        ('{"name": "h', False),
        ('{"name": "g", "args": {"a": "', False),
        ('{"name": "g", "args": {"b": "', False),
        ('{"name": "g", "args": {"more": {"a": "', False),
    ):
        assert _takes(form.start(guide), text.encode()) == fits, text


def test_parameters_that_are_no_schema_are_refused():
    def tool(parameters: Any) -> dict[str, Any]:
        return {"type": "function", "function": {"name": "f", "parameters": parameters}}

    guide = tool_choice_of([tool({"$defs": [1], "$ref": "#/$defs/D"})], "required").guide("args")
    assert guide is not None
    with pytest.raises(ValueError, match="tools: the JSON schema can't be followed"):
        GuideCompiler(byte_tokenizer(), VOCAB_SIZE).check(guide)
    nested: Any = {}
    for _ in range(100_000):
        nested = {"not": nested}
    with pytest.raises(ApiError, match="nested too deep"):
        tool_choice_of([tool(nested)], "required").guide("args")


def _takes(form: TokenGuide, tokens: bytes) -> bool:
    for token in tokens:
        if not form.mask()[token // 32] >> token % 32 & 1:
            return False
        form.push(token)
    return form.complete


@pytest.mark.parametrize(
    "choice", ["any", 1.5, {"type": "function", "name": "other"}, {"type": "allowed_tools"}, {}]
)
def test_a_choice_must_be_of_an_offered_tool(tmp_path: Path, choice: Any):
    http = Http(FakeBackend(tmp_path, template=TEMPLATE))
    body = {"messages": HELLO, "tools": TOOLS, "tool_choice": choice}
    for asked in (body, {**body, "tools": [], "tool_choice": "required"}):
        error = error_of(http.post("/v1/chat/completions", json=asked))
        assert error["param"].startswith("tool_choice")


def test_an_answer_that_is_cut_has_no_call(client: OpenAI, backend: FakeBackend):
    backend.text = LOOK
    [choice] = ask(client, max_tokens=40).choices
    assert (choice.message.content, choice.finish_reason) == (LOOK[:40], "length")
    chunks = list(ask(client, max_tokens=50, stream=True))
    [choice] = chunks[-1].choices
    assert choice.finish_reason == "length"


def test_several_choices_have_their_own_calls(client: OpenAI, backend: FakeBackend):
    backend.text = LOOK
    made = ask(client, n=3, temperature=1.0)
    assert [each.message.content for each in made.choices] == [None, "!", "!!"]
    assert [pairs(each.message) for each in made.choices] == [CALLED[:1]] * 3
    arguments = dict.fromkeys(range(3), "")
    for chunk in ask(client, n=3, temperature=1.0, stream=True):
        [choice] = chunk.choices
        for call in choice.delta.tool_calls or ():
            arguments[choice.index] += call.function.arguments
    assert [*arguments.values()] == [CALLED[0][1]] * 3


def test_reasoning_is_a_field_of_its_own(client: OpenAI, backend: FakeBackend):
    backend.text = "Hm, 世界.\n</think>\n\nYes."
    [choice] = ask(client, logprobs=True, **THINKING).choices
    assert (choice.message.content, choice.message.reasoning) == ("Yes.", "Hm, 世界.")
    assert len(choice.logprobs.content) == len(backend.text.encode())
    texts = {"content": "", "reasoning": ""}
    for chunk in ask(client, stream=True, **THINKING):
        for key, value in chunk.choices[0].delta.to_dict().items():
            if key in texts:
                texts[key] += value
    assert texts == {"content": "Yes.", "reasoning": "Hm, 世界."}
    [choice] = ask(client, max_tokens=3, **THINKING).choices
    assert (choice.message.content, choice.message.reasoning) == (None, "Hm,")
    assert "completion_tokens_details" not in ask(client, **THINKING).usage.to_dict()
    backend.text, body = "Hm.</think>Yes.", {**THINKING["extra_body"], "include_reasoning": False}
    [choice] = ask(client, **{**THINKING, "extra_body": body}).choices
    assert choice.message.to_dict() == {"role": "assistant", "content": "Yes."}


def test_an_answer_that_is_held_to_a_form_begins_with_it(tmp_path: Path):
    tokenizer = FakeBackend(tmp_path, template=TEMPLATE).bytes
    syntax, prompt = AnswerSyntax(tokenizer), tokenizer.encode("<think>\n")
    for guided, part in ((False, Reasoning("{}")), (True, Text("{}"))):
        assert syntax.reader(prompt, ToolChoice(), guided=guided).whole("{}") == [part]


def post(http: Http, **more: Any) -> dict[str, Any]:
    body = {"messages": HELLO, "tools": TOOLS, **more}
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def test_markers_that_are_control_tokens_are_seen(tmp_path: Path):
    special = ("[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<|other|>")
    backend = FakeBackend(tmp_path, special=special, template="{{ tools }}[TOOL_CALLS]")
    http = Http(backend)
    backend.text = 'A<|other|>B[TOOL_CALLS]look[ARGS]{"at": 1}'
    choice = post(http)
    [call] = choice["message"]["tool_calls"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("AB", "tool_calls")
    assert call["function"] == {"name": "look", "arguments": '{"at": 1}'}
    assert post(http, tool_choice="none")["message"]["content"] == 'ABlook{"at": 1}'
    backend.text = "A[TOOL_CALLS]oops"
    assert post(http)["message"]["content"] == "A[TOOL_CALLS]oops"
    http = Http(backend, tool_call_parser="llama3")
    backend.text = 'A[ARGS]<|python_tag|>{"name": "look", "parameters": {}}'
    assert post(http)["message"]["content"] == "A"
    http = Http(backend, tool_call_parser="none")
    backend.text = 'A[TOOL_CALLS]look[ARGS]{"at": 1}'
    assert post(http)["message"] == {"role": "assistant", "content": 'Alook{"at": 1}'}


def test_tokens_of_reasoning_are_counted(tmp_path: Path):
    backend = FakeBackend(tmp_path, special=("<think>", "</think>"), template="{{ x }}</think>.")
    http = Http(backend)
    options = {"include_usage": True, "continuous_usage_stats": True}
    for text, tokens in (
        ("\n <think>abc</think>d", 3),
        ("<think>abc", 3),
        ("<think></think>d", 0),
        ("d", 0),
        ("d <think>abc</think>", 0),
    ):
        backend.text, body = text, {"messages": HELLO}
        made = http.post("/v1/chat/completions", json=body).json()
        assert made["usage"]["completion_tokens_details"] == {"reasoning_tokens": tokens}, text
        body |= {"stream": True, "stream_options": options}
        lines = http.post("/v1/chat/completions", json=body).text.split("\n\n")[:-2]
        counts = [
            json.loads(line[6:])["usage"]["completion_tokens_details"]["reasoning_tokens"]
            for line in lines
        ]
        assert counts == sorted(counts) and counts[-1] == tokens


@pytest.mark.parametrize("arguments", ["[1]", "{", '"x"', "1"])
def test_arguments_of_earlier_calls_must_be_objects(tmp_path: Path, arguments: str):
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": arguments}}
    turns = [*HELLO, {"role": "assistant", "tool_calls": [call]}]
    http = Http(FakeBackend(tmp_path, template=TEMPLATE))
    error = error_of(http.post("/v1/chat/completions", json={"messages": turns}))
    assert error["param"] == "messages[1].tool_calls[0].function.arguments"


def test_ids_fit_mistrals_templates(tmp_path: Path):
    template = (
        "{{ tools }}[TOOL_CALLS]{% for message in messages %}{% for call in message.tool_calls or "
        "() %}{% if call.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
        "{{ call.function | tojson }}{% endfor %}{% endfor %}"
    )
    backend = FakeBackend(tmp_path, '[TOOL_CALLS][{"name": "look"}]', template)
    http = Http(backend)
    message = post(http)["message"]
    post(http, messages=[*HELLO, message])
    assert backend.prompt.endswith('{"name": "look", "arguments": {}}')
