"""Guides over bytes: what may follow, and what is refused."""

import importlib
import json

import numpy as np
import pytest

from pdjax.core.guide import MAX_CHOICES, Guide
from pdjax.text import guides
from pdjax.text.byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from pdjax.text.guides import GuideCompiler, TokenGuide


@pytest.fixture(scope="module")
def compiler():
    return GuideCompiler(byte_tokenizer(), VOCAB_SIZE + 40)  # models pad their vocabularies


def allowed(guide: TokenGuide) -> list[int]:
    bits = guide.mask()
    assert bits.dtype == np.uint32 and len(bits) == -(-(VOCAB_SIZE + 40) // 32)
    return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist()


def written(guide: TokenGuide, text: str) -> TokenGuide:
    for byte in text.encode():
        assert byte in allowed(guide), f"{chr(byte)} in {text}"
        guide.push(byte)
    return guide


def test_a_form_accepts_and_is_complete(compiler: GuideCompiler):
    guide = compiler.start(Guide.regex("[0-9]{1,2}"))
    assert (allowed(guide), guide.accepts) == ([*range(48, 58)], False)
    guide.push(49)
    # The end is no token of a mask, neither the model's own nor that of the library.
    assert (allowed(guide), guide.accepts, guide.complete) == ([*range(48, 58)], True, False)
    guide.push(50)
    assert guide.accepts and guide.complete
    assert not compiler.start(Guide.regex("[0-9]{1,2}")).accepts  # each text has a state of its own


@pytest.mark.parametrize(
    ("guide", "text"),
    [
        (Guide.json_object(), json.dumps({"a": [1, None, {"é": "\n"}]}, ensure_ascii=False)),
        (Guide.json_object(), json.dumps({"a": {"b": [1.5e3, True]}}, indent=4)),
        (Guide.json_schema({"enum": ["x", 3]}), '"x"'),
        (Guide.choices(["yes", 'a "no"\n', "müßig"]), 'a "no"\n'),
        (Guide.grammar('start: "(" start ")" | "x"'), "((x))"),
        (Guide.grammar('root ::= "a" [0-9]'), "a7"),
    ],
)
def test_texts_of_a_form(compiler: GuideCompiler, guide: Guide, text: str):
    assert written(compiler.start(guide), text).complete


def test_blanks_in_json_have_a_bound(compiler: GuideCompiler):
    guide = written(compiler.start(Guide.json_object()), '{"a":' + " " * 32)
    assert ord(" ") not in allowed(guide)


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (Guide.regex("(", "guided_regex"), "guided_regex: the regular expression can't be"),
        (Guide.json_schema('{"type"'), "guide: the JSON schema can't be followed: EOF"),
        (Guide.json_schema({"type": "cat"}), "Invalid type: cat"),
        (Guide.json_schema({"not": {}}), "Unimplemented keys"),
        (Guide.grammar("start: cat"), "guide: the grammar .* unknown name"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_the_reason(compiler, guide, message):
    with pytest.raises(ValueError, match=message) as error:
        compiler.check(guide)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_a_guide_that_is_checked_again_and_again_is_compiled_once(
    compiler: GuideCompiler, monkeypatch: pytest.MonkeyPatch
):
    compiler.check(Guide.regex("once"))
    monkeypatch.setattr(compiler, "_compile", lambda *_: pytest.fail("compiled again"))
    compiler.check(Guide.regex("once"))
    written(compiler.start(Guide.regex("once", "another name")), "once")


def test_without_the_library_there_are_no_guides(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"guide: needs the package llguidance.*pdjax\[guided\]"):
        GuideCompiler(byte_tokenizer(), VOCAB_SIZE).check(Guide.regex("a"))


def test_as_many_choices_as_may_be_asked_for(compiler: GuideCompiler):
    choices = Guide.choices([f"choice {i}." for i in range(MAX_CHOICES)])
    assert written(compiler.start(choices), "choice 4095.").complete


def test_a_text_that_comes_to_its_bound_leaves_others_theirs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(guides._LIMITS, "max_lexer_states", 200)
    compiler, guide = (
        GuideCompiler(byte_tokenizer(), VOCAB_SIZE + 40),
        Guide.regex("[ab]*a[ab]{9}c"),
    )
    compiler.check(guide)
    hungry, beside = compiler.start(guide), compiler.start(guide)
    written(beside, "a")
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="can't be followed any further: lexer error: too many"):
        written(hungry, "".join(rng.choice(["a", "b"], 1000)))
    for one in beside, compiler.start(guide):
        written(one, "ab" * 20)
