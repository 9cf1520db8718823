"""Chat templates and tokenizer directories compared with Hugging Face transformers."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pdjax.text.chat_template import ChatTemplates
from pdjax.text.tokenizer import Tokenizer
from pdjax.text.tool_schema import function_schema
from tests.parity import chat_cases, text_results, tokenizer_cases, tokenizer_parts, tool_cases


@functools.cache
def expected() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "fixtures" / "text.json").read_text())


def render(templates: ChatTemplates, conversation: dict[str, Any]) -> str | None:
    """Render the text; None where the template refuses the conversation."""
    arguments = dict(conversation)
    variables = arguments.pop("chat_template_kwargs", None)
    try:
        return templates.render(**arguments, variables=variables)
    except ValueError:
        return None


@pytest.mark.parametrize("name", chat_cases.TEMPLATES)
def test_conversations_are_rendered_as_by_transformers(name: str):
    source = chat_cases.TEMPLATES[name]
    templates = ChatTemplates(source, chat_cases.SPECIAL_TOKENS, chat_cases.NOW.strftime)
    for case, conversation in chat_cases.CONVERSATIONS.items():
        text = render(templates, conversation)
        found = "refused" if text is None else text_results.digest(text)
        assert found == expected()["templates"][f"{name}/{case}"], f"{case}: {text}"


@pytest.mark.parametrize("function", tool_cases.FUNCTIONS, ids=lambda f: f.__qualname__)
def test_functions_have_the_schemas_of_transformers(function: Callable[..., Any]):
    wanted = expected()["tools"][function.__qualname__]
    templates = ChatTemplates("{{ tools[0] | tojson }}", {}, chat_cases.NOW.strftime)
    conversation: dict[str, Any] = {"messages": [{"role": "user", "content": ""}]}
    conversation["tools"] = [function]
    if wanted == "refused":
        with pytest.raises(ValueError, match=f"^tools: {function.__name__} has no schema"):
            templates.render(**conversation)
        return
    schema = function_schema(function)
    assert text_results.digest(json.dumps(schema)) == wanted, schema
    assert templates.render(**conversation) == json.dumps(schema)


@pytest.mark.parametrize("name", tokenizer_cases.directories())
def test_directories_are_read_as_by_transformers(name: str, tmp_path: Path):
    wanted = expected()["tokenizers"][name]
    files = tokenizer_cases.directories()[name]
    tokenizer = Tokenizer.open(tokenizer_cases.write(files, tmp_path / name))
    assert tokenizer.special_tokens == wanted["special_tokens"]
    added = text_results.added_tokens(tokenizer._backend)
    assert text_results.digest(added) == wanted["added"], added
    found = text_results.cut(tokenizer.encode, tokenizer.decode)
    strings = tokenizer_parts.strings()
    for i, (one, other) in enumerate(zip(found, wanted["strings"], strict=True)):
        group = strings[i * text_results.GROUP : (i + 1) * text_results.GROUP]
        assert one == other, {text: tokenizer.encode(text) for text in group}


@pytest.mark.parametrize("name", ["listed_in_config", "llama_pieces_new", "qwen2_words"])
def test_a_saved_tokenizer_is_the_same(name: str, tmp_path: Path):
    files = tokenizer_cases.directories()[name]
    tokenizer = Tokenizer.open(tokenizer_cases.write(files, tmp_path / name))
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    saved = Tokenizer.open(tmp_path / "saved")
    assert saved.special_tokens == tokenizer.special_tokens
    assert saved.eos_token_ids == tokenizer.eos_token_ids
    assert saved.special_token_ids == tokenizer.special_token_ids
    for text in tokenizer_parts.STRINGS:
        assert saved.encode(text) == tokenizer.encode(text)
        assert saved.decode(saved.encode(text)) == tokenizer.decode(saved.encode(text))
