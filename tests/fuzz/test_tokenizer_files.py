"""For any files of a tokenizer and any chat template, the answer within a second is a tokenizer
that works, or one line that names the wrong file."""

import functools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from pdjax.text.chat_template import ChatTemplates
from pdjax.text.tokenizer import Tokenizer
from tests.helpers.mutate import answer, cases, check_message, mutated, within_a_second
from tests.parity import chat_cases, tokenizer_cases, tokenizer_parts

DIRECTORIES = {
    name: {
        file: content.to_str() if isinstance(content, Backend) else content
        for file, content in files.items()
    }
    for name, files in tokenizer_cases.directories().items()
}
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
JSON_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2**31,
        2**32,
        2**64,
        10**40,
        1.5,
        "",
        "a",
        "<s>",
        "\ud800",
        "\n",
    ),
    *([], {}, [[]], ["<s>"], [None], {"content": "<s>"}, {"content": 3}, {"": ""}, [["a", 0.5]]),
    *(
        "x" * 5000,
        "▁",
        "BPE",
        "WordLevel",
        "Unigram",
        "WordPiece",
        "ByteLevel",
        "Metaspace",
        "(",
        "a" * 3,
    ),
    *({"type": "Sequence", "decoders": []}, {"type": "Fuse"}, {"type": "ByteLevel"}),
    *({"String": "a"}, {"Regex": "a"}, {"Regex": "("}, {"__type": "AddedToken", "content": "z"}),
    *(
        "LlamaTokenizer",
        "Qwen2Tokenizer",
        "GPT2Tokenizer",
        "GPTNeoXTokenizer",
        "PreTrainedTokenizer",
    ),
)
FIELDS = (
    *("bos_token", "eos_token", "pad_token", "image_token", "additional_special_tokens", "legacy"),
    *("extra_special_tokens", "added_tokens_decoder", "chat_template", "tokenizer_class", "model"),
    *("add_prefix_space", "add_bos_token", "split_special_tokens", "implied_tokens", "decoder"),
)


def changed(draw: random.Random, value: Any) -> Any:
    """Replace, leave out or add something in a JSON value."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.1:
        return draw.choice(JSON_VALUES)
    made: Any = dict(value) if isinstance(value, dict) else list(value)
    place = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    match draw.randrange(8):
        case 0:
            del made[place]
        case 1 if isinstance(made, dict):
            made[draw.choice([*FIELDS, *made])] = draw.choice(JSON_VALUES)
        case 2 if isinstance(made, list):
            made.insert(place, draw.choice(JSON_VALUES))
        case _:
            made[place] = changed(draw, value[place])
    return made


def broken_file(draw: random.Random, content: Any) -> bytes:
    if isinstance(content, bytes):
        return mutated(content, draw)
    text = content if isinstance(content, str) else json.dumps(content)
    if draw.random() < 0.25:
        return mutated(text.encode(), draw)
    try:
        tree = json.loads(text)
    except ValueError:
        return mutated(text.encode(), draw)
    for _ in range(draw.randint(1, 3)):
        tree = changed(draw, tree)
    return json.dumps(tree).encode()


def write_broken(draw: random.Random, directory: Path) -> Path:
    files = dict(draw.choice(list(DIRECTORIES.values())))
    if draw.random() < 0.3:
        files.setdefault("tokenizer_config.json", {})
    chosen = draw.choice(list(files))
    files[chosen] = broken_file(draw, files[chosen])
    if draw.random() < 0.1:
        name = draw.choice(
            ("special_tokens_map.json", "added_tokens.json", "generation_config.json")
        )
        files[name] = broken_file(draw, {"<s>": 5, "eos_token": "<s>", "eos_token_id": [1, 2]})
    return tokenizer_cases.write(files, directory)


def use(tokenizer: Tokenizer, draw: random.Random) -> None:
    """Encode; decode at once and piece by piece."""
    text = draw.choice(tokenizer_parts.STRINGS)
    try:
        ids = tokenizer.encode(text)
    except ValueError as error:
        check_message(str(error))
        ids = []
    ids += [draw.randrange(tokenizer.vocab_size + 3) for _ in range(draw.randint(0, 8))]
    for skip in (True, False):
        decoder = tokenizer.incremental_decoder(skip)
        streamed = "".join(map(decoder.push, ids)) + decoder.flush()
        assert streamed == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("part", range(4))
def test_files(part: int, tmp_path: Path):
    opened = 0
    runs = cases(40)
    for seed in runs:
        draw = random.Random(f"{part} {seed}")
        directory = write_broken(draw, tmp_path / str(seed))
        tokenizer = answer(functools.partial(Tokenizer.open, directory))
        if isinstance(tokenizer, Tokenizer):
            opened += 1
            with within_a_second():
                use(tokenizer, draw)
        else:
            assert str(directory) in tokenizer, (seed, tokenizer)
    assert opened > len(runs) // 10


PIECES = (
    *(
        "{{ ",
        " }}",
        "{% for m in messages %}",
        "{% endfor %}",
        "{% if x %}",
        "{% endif %}",
        "messages",
    ),
    *(
        "{% set x = 1 %}",
        "{% break %}",
        "{% generation %}",
        "{% endgeneration %}",
        " | tojson",
        "-",
    ),
    *(
        "{% macro f(x) %}",
        "{% endmacro %}",
        "f(1)",
        "namespace(a=1)",
        "{#",
        "#}",
        "x.y",
        "[0]",
        "|",
    ),
    *("{% call f(1) %}", "{% endcall %}", "raise_exception('no')", "strftime_now('%')", "content"),
    *("{% filter upper %}", "{% endfilter %}", "loop.index", "messages[0]", "'", "~", "**", "dict"),
)


def test_templates():
    for seed in cases(130):
        draw = random.Random(seed)
        source = draw.choice(list(chat_cases.TEMPLATES.values()))
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(source) + 1)
            match draw.randrange(3):
                case 0:
                    source = source[:at] + draw.choice(PIECES) + source[at:]
                case 1:
                    source = source[:at] + source[at + draw.randint(1, 20) :]
                case _:
                    end = draw.randrange(at, len(source) + 1)
                    source = source[:end] + source[at:]
            source = source[:20_000]
        conversation = dict(draw.choice(list(chat_cases.CONVERSATIONS.values())))
        variables = conversation.pop("chat_template_kwargs", None)
        templates = ChatTemplates(source, chat_cases.SPECIAL_TOKENS, chat_cases.NOW.strftime)
        found = answer(functools.partial(templates.render, **conversation, variables=variables))
        assert isinstance(found, str), seed


def test_conversations():
    """Any value given as a conversation is rendered, or refused by name."""
    templates = ChatTemplates(chat_cases.TEMPLATES["qwen_tools"], {}, chat_cases.NOW.strftime)
    for seed in cases(130):
        draw = random.Random(seed)
        base = draw.choice(list(chat_cases.CONVERSATIONS.values()))
        arguments = {"messages": base["messages"], "tools": base.get("tools"), "documents": None}
        arguments["variables"] = base.get("chat_template_kwargs")
        name = draw.choice(list(arguments))
        arguments[name] = changed(draw, arguments[name])
        found = answer(functools.partial(templates.render, **arguments))
        assert isinstance(found, str), seed


def test_a_message_that_names_a_file_is_one_line(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text('{"model": "' + "x" * 100_000 + '"}')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a readable tokenizer") as caught:
        Tokenizer.open(tmp_path)
    check_message(str(caught.value))
