"""Calls of tools and reasoning are read from an answer's text, however it is cut."""

import json
import random
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from pdjax.serving.chat_message import ChatMessage
from pdjax.serving.conversations import messages_of
from pdjax.serving.parsers.answer import AnswerReader, AnswerSyntax
from pdjax.serving.parsers.cursor import Parser
from pdjax.serving.parsers.json_scanner import JsonScanner
from pdjax.serving.parsers.registry import REASONING_PARSERS, TOOL_PARSERS, parser_of
from pdjax.text.tokenizer import Tokenizer
from tests.parity.chat_cases import TEMPLATES

pytestmark = pytest.mark.smoke

LOOK = '{"name": "look", "arguments": {"at": "a \\"b\\" {}"}}'
FIND = '{"parameters": {"n": [1, -2.5e3, null, true]}, "type": "function", "name": "find"}'
LOOKED = ("look", '{"at": "a \\"b\\" {}"}')
FOUND = ("find", '{"n": [1, -2.5e3, null, true]}')
NAMES = frozenset({"look", "find", "now"})

CALLS: list[tuple[str, str, str | None, list[tuple[str, str]]]] = [
    ("hermes", f"<tool_call>\n{LOOK}\n</tool_call>", None, [LOOKED]),
    ("hermes", f"\n\n<tool_call>{LOOK}</tool_call>\n<tool_call>{FIND}\n", None, [LOOKED, FOUND]),
    ("hermes", f"I look.\n<tool_call>{LOOK}</tool_call> Wait. ", "I look.Wait. ", [LOOKED]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', None, [("now", "{}")]),
    ("hermes", '<tool_call>{"why": [{}], "name": "x", "arguments": {}}', None, [("x", "{}")]),
    ("hermes", "1 < 2 <tool_cal </tool_call> \n", "1 < 2 <tool_cal </tool_call> \n", []),
    ("llama3", LOOK, None, [LOOKED]),
    ("llama3", f" \n{LOOK}; {FIND}\n", None, [LOOKED, FOUND]),
    ("llama3", f"{LOOK}\n{FIND}", None, [LOOKED, FOUND]),
    ("llama3", f"Look: <|python_tag|>{FIND}", "Look:", [FOUND]),
    ("llama3", f"The call is {LOOK}", f"The call is {LOOK}", []),
    ("llama3", '{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', []),
    ("llama3", '<|python_tag|>{"name": "Bob", "parameters": {}}', None, [("Bob", "{}")]),
    ("llama3", '{"name": "look", "age": 3}', '{"name": "look", "age": 3}', []),
    ("mistral", f"[TOOL_CALLS] [{LOOK}, {FIND}]", None, [LOOKED, FOUND]),
    ("mistral", f"[TOOL_CALLS][{LOOK}] done", "done", [LOOKED]),
    ("mistral", 'So:[TOOL_CALLS]look[ARGS]{"at": 1}', "So:", [("look", '{"at": 1}')]),
    (
        "mistral",
        '[TOOL_CALLS]look[CALL_ID]abcdefghi[ARGS]{"at": 1}[TOOL_CALLS] a_b-c [ARGS] {}',
        None,
        [("look", '{"at": 1}'), ("a_b-c", "{}")],
    ),
]
"""Of a family: a text, its content, and its calls."""

BROKEN = [
    ("hermes", '<tool_call>{"name": "look", "arguments": {"a": oops}}</tool_call>'),
    ("hermes", '\n<tool_call>{"name": "look", "arguments": {"a": "b'),
    ("hermes", '<tool_call>{"name": "look", "arguments": "{}"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "look", "arguments": null}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "a", "name": "b", "arguments": {}, }</tool_call>'),
    ("hermes", "<tool_call>[1]</tool_call><tool_call>\n<function=look></function></tool_call>"),
    ("hermes", '<tool_call>{"name": "look", "arguments": {"a": 01}}'),
    ("hermes", '<tool_call>{"name": "look", "arguments": {"a": "line\nbreak"}}'),
    ("llama3", '{"name": "look", "parameters": {"a": NaN}}'),
    ("llama3", '<|python_tag|>search.call(query="x")'),
    ("llama3", '{"name": "look"'),
    ("mistral", "[TOOL_CALLS]look{}"),
    ("mistral", "[TOOL_CALLS][]"),
    ("mistral", "[TOOL_CALLS]"),
    ("mistral", '[TOOL_CALLS]look[ARGS]{"a": }'),
]
"""Texts that look like calls and are none: they are content, as they are."""


def reader(family: str, first_alone: bool = False) -> AnswerReader:
    read = TOOL_PARSERS[family].read
    return AnswerReader([Parser(lambda cursor: read(cursor, NAMES))], first_alone=first_alone)


def whole(read: AnswerReader, text: str) -> dict[str, Any]:
    return told(ChatMessage(read).whole(text))


def told(message: dict[str, Any]) -> dict[str, Any]:
    """A message without the ids of its calls."""
    calls = [call["function"] for call in message.get("tool_calls", ())]
    pairs = [(call["name"], call["arguments"]) for call in calls]
    return {key: message.get(key) for key in ("content", "reasoning")} | {"calls": pairs}


def streamed(read: AnswerReader, pieces: list[str]) -> dict[str, Any]:
    """What a client makes of the deltas: texts and arguments are joined."""
    message, made = ChatMessage(read), dict[str, Any](content=None, reasoning=None)
    calls: list[dict[str, Any]] = []
    deltas = [message.delta(piece, ended=False) for piece in pieces]
    for delta in [*deltas, message.delta("", ended=True)]:
        for key in ("content", "reasoning"):
            if key in delta:
                assert delta[key]
                made[key] = (made[key] or "") + delta[key]
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(calls):
                assert call["id"] and call["type"] == "function"
                calls.append({"function": {"name": call["function"]["name"], "arguments": ""}})
            else:
                assert call["index"] == len(calls) - 1 and set(call) == {"index", "function"}
            calls[-1]["function"]["arguments"] += call["function"]["arguments"]
    return told({**made, "tool_calls": calls})


def cut(text: str, draw: random.Random) -> list[str]:
    """A text in pieces, some of them empty."""
    most = draw.choice((1, 2, 5, 40))
    pieces = []
    while text:
        length = draw.randint(0, most)
        pieces.append(text[:length])
        text = text[length:]
    return pieces


@pytest.mark.parametrize(("family", "text", "content", "calls"), CALLS)
def test_calls_are_read_whole_and_in_pieces(
    family: str, text: str, content: str | None, calls: list[tuple[str, str]]
):
    expected = {"content": content, "reasoning": None, "calls": calls}
    assert whole(reader(family), text) == expected
    assert streamed(reader(family), [*text]) == expected
    for seed in range(20):
        assert streamed(reader(family), cut(text, random.Random(seed))) == expected


@pytest.mark.parametrize(("family", "text"), BROKEN)
def test_what_is_no_call_is_text_as_it_was(family: str, text: str):
    assert whole(reader(family), text) == {"content": text, "reasoning": None, "calls": []}
    message = ChatMessage(reader(family))
    message.delta(text, ended=True)
    assert message.finish_reason("stop") == "stop"


def test_the_first_call_may_be_the_only_one():
    text = f"<tool_call>{LOOK}</tool_call><tool_call>{FIND}</tool_call><tool_call>{{"
    expected = {"content": "<tool_call>{", "reasoning": None, "calls": [LOOKED]}
    assert whole(reader("hermes", first_alone=True), text) == expected
    assert streamed(reader("hermes", first_alone=True), [*text]) == expected


def test_arguments_come_as_they_are_written():
    message = ChatMessage(reader("hermes"))
    deltas = [message.delta(piece, ended=False) for piece in [*f"<tool_call>{LOOK}</tool_call>"]]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["function"]["arguments"] for call in calls] == [*LOOKED[1]]
    assert calls[0]["function"]["name"] == "look" and len(calls[0]["id"]) == 9
    assert [message.finish_reason(each) for each in ("stop", "length", None)] == [
        "tool_calls",
        "length",
        None,
    ]


PIECES = (
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<think>"),
    *("</think>", "{", "}", "[", "]", ",", ":", ";", " ", "\n", '"', "\\", "\\u12", "1", "-", "e"),
    *('"name"', '"arguments"', '"look"', "look", LOOK, FIND, "true", "nul", "ü", "<", "é<tool"),
)


@pytest.mark.parametrize("family", TOOL_PARSERS)
def test_no_text_is_read_differently_in_other_pieces(family: str):
    draw = random.Random(family)
    for _ in range(150):
        text = "".join(draw.choice(PIECES) for _ in range(draw.randint(1, 25)))
        first = streamed(both(family), [text])
        assert streamed(both(family), cut(text, draw)) == first, text
        message = whole(both(family), text)
        if message["content"] == first["content"]:  # no call was begun that is none
            assert message == first, text


def both(family: str, is_open: bool = False) -> AnswerReader:
    think, read = REASONING_PARSERS["think"].read, TOOL_PARSERS[family].read
    return AnswerReader(
        [
            Parser(lambda cursor: think(cursor, is_open)),
            Parser(lambda cursor: read(cursor, NAMES)),
        ]
    )


@pytest.mark.parametrize(
    ("is_open", "text", "reasoning", "content", "calls"),
    [
        (False, "<think>\nHm. \n</think>\n\nYes.", "Hm.", "Yes.", []),
        (True, "\nHm.\n</think>\n\nYes.\n", "Hm.", "Yes.\n", []),
        (True, "Hm. \n", "Hm. \n", None, []),
        (False, " <think>\n\n</think>\n\nYes.", None, "Yes.", []),
        (False, " Yes. <think>no</think>", None, " Yes. <think>no</think>", []),
        (False, "<thin", None, "<thin", []),
        (
            False,
            f"<think>I <tool_call></think>\n<tool_call>{LOOK}</tool_call>",
            "I <tool_call>",
            None,
            [LOOKED],
        ),
    ],
)
def test_reasoning_is_apart_from_the_answer(
    is_open: bool, text: str, reasoning: str | None, content: str | None, calls: Any
):
    expected = {"content": content, "reasoning": reasoning, "calls": calls}
    assert whole(both("hermes", is_open), text) == expected
    for seed in range(20):
        pieces = cut(text, random.Random(seed))
        assert streamed(both("hermes", is_open), pieces) == expected


def random_value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(8 if depth < 3 else 6)
    if kind == 6:
        return [random_value(draw, depth + 1) for _ in range(draw.randint(0, 3))]
    if kind == 7:
        return {f"k{i}": random_value(draw, depth + 1) for i in range(draw.randint(0, 3))}
    texts = ("", 'a"\\\n\u2028', "ü😀", "{}[]")
    return (None, True, -draw.random(), draw.randint(-9, 9), 1e300, draw.choice(texts))[kind]


def is_json(text: str) -> bool:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


def test_the_scanner_agrees_with_pythons_own():
    draw = random.Random(5)
    wrong = 0
    for _ in range(2000):
        spaces = draw.choice((None, 1))
        text = json.dumps([random_value(draw)], indent=spaces, ensure_ascii=draw.random() < 0.5)
        if draw.random() < 0.7:
            at = draw.randrange(len(text))
            new = draw.choice(("", "x", "0", '"', "\\", "]", "}", ",", ":", "-", ".", "\x01", " "))
            text = text[:at] + new + text[at + draw.randint(0, 1) :]
        scanner, at = JsonScanner(), 0
        for piece in cut(text, draw):
            taken = scanner.feed(piece)
            at += taken
            if taken < len(piece):
                break
        ended = scanner.ended and not text[at:].strip()
        assert ended == is_json(text), text
        wrong += not ended
    assert 300 < wrong < 1700


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ("qwen_tools", "hermes", "think"),
        ("llama3_tools", "llama3", "none"),
        ("deepseek_thinking", "none", "think"),
        ("chatml", "none", "none"),
        ({"default": "x", "tool_use": "[TOOL_CALLS]"}, "mistral", "none"),
        ("<tool_call>\n<function={{ name }}>", "none", "none"),
        (None, "none", "none"),
    ],
)
def test_parsers_are_found_by_the_template(template: Any, tools: str, reasoning: str):
    source = TEMPLATES.get(template, template) if isinstance(template, str) else template
    tokenizer = Tokenizer(Backend(models.BPE()), chat_template=source)
    syntax = AnswerSyntax(tokenizer)
    assert (syntax.tool_parser, syntax.reasoning_parser) == (tools, reasoning)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen_tools", '{"name": "look", "arguments": {"at": "über"}}'),
        ("llama3_tools", '{"name": "look", "parameters": {"at": "über"}}'),
    ],
)
def test_templates_write_calls_as_they_are_read(name: str, expected: str):
    function = {"name": "look", "arguments": '{"at":"\\u00fcber"}'}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "function": function}]},
        {"role": "tool", "tool_call_id": "a", "content": "done"},
        {"role": "assistant", "content": "Done.", "tool_calls": []},
    ]
    assert [each["content"] for each in messages_of(turns)] == ["hello", "", "done", "Done."]
    tokenizer = Tokenizer(Backend(models.BPE()), chat_template=TEMPLATES[name], bos_token="")
    assert expected in tokenizer.render_chat(messages_of(turns))
    family = AnswerSyntax(tokenizer).tool_parser
    text = f"<tool_call>{expected}" if family == "hermes" else expected
    assert whole(reader(family), text)["calls"] == [("look", '{"at": "über"}')]


def test_parsers_are_found_by_name():
    found = parser_of("tool_call_parser", "none", TOOL_PARSERS, None)
    assert found == parser_of("tool_call_parser", "auto", TOOL_PARSERS, None) == ("none", None)
    with pytest.raises(ValueError, match="tool_call_parser='x': must be one of auto, none, hermes"):
        parser_of("tool_call_parser", "x", TOOL_PARSERS, None)
    with pytest.raises(ValueError, match="has no tokenizer"):
        parser_of("tool_call_parser", "hermes", TOOL_PARSERS, None)
