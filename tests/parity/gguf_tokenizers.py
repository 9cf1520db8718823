"""Vocabularies for the comparison of GGUF tokenizers with llama.cpp.

Each is small and was trained without a pretokenizer, so its tokens span words, digits and spaces:
if a text is cut at other places, the ids differ. `make_gguf_fixtures.py` trains them, gets the ids
from llama.cpp, and writes both into one fixture.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from tests.helpers.nasty_strings import WRITTEN, random_strings

FIXTURE = Path(__file__).parent / "fixtures" / "gguf_tokens.json"

STRINGS = WRITTEN + random_strings(50)

WITH_TOKENS = [
    "<s>",
    "</s>x",
    "<s> hi </s> there",
    "a<|tool|>b",
    "<|tool|><|tool|> <|tool|>",
    " <|tool|> ",
    "<|im_end|>\n<|im_end|>",
    "<unk> and <unk>",
    "<|too l|> <s > </ s>",
    "x<s>\n\n</s>\n",
    "<0x41> <0x0A>",
    "\u2581 x\u2581y",
    "<spare>",
    "abc<|tool|>def 123</s>456",
]
"""Texts that contain the texts of tokens."""

_SPECIAL = ["<unk>", "<s>", "</s>"]
_MORE = ["<|tool|>", "<|im_end|>", "<spare>"]
_MORE_TYPES = [4, 1, 5]  # user-defined; normal, with the text of an end of turn; unused


def read_fixture() -> dict[str, Any]:
    """Read the fixture: merges, pieces with their scores, and ids by name."""
    return json.loads(FIXTURE.read_text(encoding="utf-8"))


def byte_level(merges: list[str], pre: str) -> dict[str, Any]:
    """Make metadata of a byte-level BPE; its vocabulary is the bytes and the merged tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*_SPECIAL, *letters, *(merge.replace(" ", "") for merge in merges), *_MORE]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [1] * (len(tokens) - 6) + _MORE_TYPES,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


SENTENCEPIECE: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_prefix": {"tokenizer.ggml.add_space_prefix": False},
    "both_ends": {"tokenizer.ggml.add_eos_token": True},
    "no_ends": {"tokenizer.ggml.add_bos_token": False},
    "extra_spaces": {"tokenizer.ggml.remove_extra_whitespaces": True},
    "unnamed": {
        "tokenizer.ggml.bos_token_id": None,
        "tokenizer.ggml.eos_token_id": None,
        "tokenizer.ggml.unknown_token_id": None,
    },
}
"""Variants of one vocabulary, as changes of its metadata."""


def sentencepiece(pieces: list[list[Any]], variant: str) -> dict[str, Any]:
    """Make metadata of a SentencePiece BPE with pieces [text, score, type]."""
    tokens = [text for text, _, _ in pieces] + _MORE
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [float(score) for _, score, _ in pieces] + [0.0] * 3,
        "tokenizer.ggml.token_type": [kind for _, _, kind in pieces] + _MORE_TYPES,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | SENTENCEPIECE[variant]
