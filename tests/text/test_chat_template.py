"""Chat templates: the choice of a template, its variables, and its limits."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdjax.text import chat_template
from pdjax.text.tokenizer import Tokenizer
from tests.helpers.tiny_tokenizer import USER, write_directory


def test_where_a_template_may_be(tmp_path: Path):
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    directory = write_directory(tmp_path, {"chat_template": named})
    assert Tokenizer.open(directory).render_chat(USER) == "d"
    write_directory(tmp_path, {"chat_template": "old"}, template="{{ messages[0]['content'] }}!")
    assert Tokenizer.open(directory).render_chat(USER) == "hi!"


def test_what_templates_may_use(tmp_path: Path):
    source = (
        "{%- for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{{ m | tojson }}{% endfor %} {{ strftime_now('%Y') }}{{ add_generation_prompt }}"
    )
    directory = write_directory(tmp_path, {}, template=source)
    tokenizer = Tokenizer.open(directory, strftime_now=lambda form: form.replace("%Y", "2000"))
    message = {"role": "user", "content": "é"}
    text = tokenizer.render_chat([message, message], add_generation_prompt=False)
    assert text == '{"role": "user", "content": "é"} 2000False'


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, USER, "no chat template"),
        ("x", [], "at least one message"),
        ("x", [{"role": "user"}], "'role' and 'content'"),
        ("x", ["hi"], "'role' and 'content'"),
        ("x", None, "messages=None: must be a list"),
        ("x", "hi", "messages='hi': must be a list"),
        ("x", {"role": "user", "content": "hi"}, "must be a list"),
        ("x", [{"role": "user", "content": None}], "'role' and 'content'"),
        ("x", [{"content": "hi"}], "'role' and 'content'"),
        ("x", [{"role": 1, "content": "hi"}], "role=1: must be a string"),
        ("{{ 1 / 0 }}", USER, "refuses them .division by zero"),
        ("{{ messages + 1 }}", USER, "refuses them"),
        ("{{ raise_exception('roles must alternate') }}", USER, "roles must alternate"),
        ("{{ messages[0]['content'].__class__.__mro__ }}", USER, "refuses them"),
        ("{% if %}", USER, "refuses them"),
    ],
)
def test_chat_refusals(template: str | None, messages: Any, message: str, tmp_path: Path):
    tokenizer = Tokenizer.open(write_directory(tmp_path, {}, template))
    with pytest.raises(ValueError, match=message):
        tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize(
    ("files", "tools", "expected"),
    [
        ({"chat_template.jinja": "file", "tokenizer_config.json": "config"}, None, "file"),
        ({"tokenizer_config.json": "config", "chat_template.json": "old"}, None, "config"),
        ({"chat_template.json": "old"}, None, "old"),
        ({"chat_template.jinja": "a\r\nb\r\n"}, None, "a\nb"),
        ({"chat_template.jinja": "d", "additional_chat_templates/tool_use.jinja": "t"}, [], "t"),
        ({"chat_template.jinja": "d", "additional_chat_templates/tool_use.jinja": "t"}, None, "d"),
        ({"chat_template.jinja": "d", "additional_chat_templates/rag.jinja": "r"}, [], "d"),
    ],
)
def test_which_template_is_used(
    files: dict[str, str], tools: list[Any] | None, expected: str, tmp_path: Path
):
    write_directory(tmp_path, {})
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = json.dumps({"chat_template": source}) if name.endswith(".json") else source
        (tmp_path / name).write_bytes(text.encode())
    assert Tokenizer.open(tmp_path).render_chat(USER, tools=tools) == expected


def test_a_template_may_be_named_or_given(tmp_path: Path):
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "{{ x }}"}]
    tokenizer = Tokenizer.open(write_directory(tmp_path, {"chat_template": named}))
    assert tokenizer.render_chat(USER, chat_template="rag") == "r"
    assert tokenizer.render_chat(USER, chat_template="{{ 1 }}") == "1"
    assert tokenizer.render_chat(USER, x="y") == "y"
    ids = tokenizer.apply_chat_template(USER, chat_template_kwargs={"x": "y"})
    assert tokenizer.decode(ids) == "y"
    only = Tokenizer.open(write_directory(tmp_path, {"chat_template": named[:1]}))
    with pytest.raises(
        ValueError, match=r"none of the model's is 'default'; give one of \['rag'\]"
    ):
        only.render_chat(USER)


@dataclasses.dataclass
class Turn:
    role: str
    content: Any
    tool_calls: Any = None


class Dumped:
    def model_dump(self) -> dict[str, Any]:
        return {"role": "user", "content": (1, np.float32(0.5), np.bool_(False)), "name": None}


@pytest.mark.parametrize(
    ("message", "seen"),
    [
        (Turn("user", "hi"), {"role": "user", "content": "hi"}),
        (Dumped(), {"role": "user", "content": (1, 0.5, False)}),
        ({"role": "tool", "content": np.zeros(3)}, {"role": "tool", "content": "<ndarray>"}),
        ({"role": "a", "tool_calls": [{"x": None}]}, {"role": "a", "tool_calls": [{"x": None}]}),
    ],
)
def test_a_template_sees_plain_data(message: Any, seen: dict[str, Any], tmp_path: Path):
    directory = write_directory(tmp_path, {}, template="{{ messages[0] }}")
    assert Tokenizer.open(directory).render_chat([message]) == str(seen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tools": "x"}, "tools='x': must be a list"),
        ({"tools": ["x"]}, "tools: 'x': must be"),
        ({"tools": {"a": 1}}, "tools={'a': 1}: must be a list"),
        ({"documents": [1]}, "documents: 1: must be mappings"),
        ({"chat_template": 3}, "chat_template=3: must be None, or the name or source of one"),
        ({"chat_template_kwargs": [1]}, "must be a mapping of names to values"),
        ({"chat_template_kwargs": {"tools": []}}, "'tools' has an argument of its own"),
    ],
)
def test_arguments_of_a_chat(arguments: dict[str, Any], message: str, tmp_path: Path):
    tokenizer = Tokenizer.open(write_directory(tmp_path, {}, template="x"))
    with pytest.raises(ValueError, match=message):
        tokenizer.apply_chat_template(USER, **arguments)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% set n = namespace(_a=1) %}", "must not have the attribute '_a'"),
        ("{{ messages.append(1) }}", "refuses them"),
        ("{{ 2 ** 5000 }}", "is too large"),
    ],
)
def test_what_a_template_must_not_do(template: str, message: str, tmp_path: Path):
    tokenizer = Tokenizer.open(write_directory(tmp_path, {}, template=template))
    with pytest.raises(ValueError, match=message):
        tokenizer.render_chat(USER)


def test_loops_and_texts_of_a_template_have_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chat_template, "MAX_ITERATIONS", 100)
    monkeypatch.setattr(chat_template, "MAX_CHARACTERS", 100)
    for source, message in (
        ("{% for i in range(11) %}{% for j in range(10) %}{% endfor %}{% endfor %}", "100 turns"),
        ("{% for i in range(60) %}ab{% endfor %}", "more than 100 characters"),
        ("{{ 'ab' * 51 }}", "51 times 2 is too large"),
    ):
        tokenizer = Tokenizer.open(write_directory(tmp_path, {}, template=source))
        with pytest.raises(ValueError, match=message):
            tokenizer.render_chat(USER)
    fine = "{% for i in range(10) %}{{ loop.length }}{{ loop.last }}{% else %}none{% endfor %}"
    tokenizer = Tokenizer.open(write_directory(tmp_path, {}, template=fine))
    assert tokenizer.render_chat(USER) == "10False" * 9 + "10True"
    assert tokenizer.render_chat(USER) == "10False" * 9 + "10True"  # each rendering counts from 0


def test_bytes_are_no_content():
    templates = chat_template.ChatTemplates("{{ messages[0].content }}", {}, lambda form: form)
    with pytest.raises(ValueError, match=r"^messages: content=b'hi': must be text, not bytes$"):
        templates.render([{"role": "user", "content": b"hi"}])
