"""Forms over a vocabulary of a model that has none."""

import random
from collections.abc import Callable
from time import perf_counter

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from pdjax.core.guide import Guide
from pdjax.host.sequences.constraint import SequenceGuide
from pdjax.text.guides import GuideCompiler
from pdjax.text.tokenizer import Tokenizer

_RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "score": {"type": "number"},
        "kind": {"enum": ["person", "company", "place"]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{2,8}$"}},
    },
    "required": ["name", "age", "score", "kind", "tags"],
    "additionalProperties": False,
}

_GUIDES = {
    "schema": Guide.json_schema({"type": "array", "items": _RECORD, "minItems": 4096}),
    "regex": Guide.regex(r"([A-Z][a-z]{1,12}( [a-z]{1,12}){3,20}[.?!] )+"),
}

FORMS = ("schema", "regex", "any")
"""A list of records in JSON, of which an answer never has enough; sentences, for which llguidance
walks most of the vocabulary at each token; any text, for what masks cost when they cost nothing to
work out."""

_LETTERS, _SIGNS, _DIGITS = (
    "etaoinsrhldcumfpgwybvkxjqzETAOINS",
    "\"',.:;-_/(){}[]\\<>=*#&",
    "0123456789",
)
_LONGEST = 16


def random_tokenizer(vocab_size: int, seed: int = 0) -> Tokenizer:
    """A byte-level vocabulary of as many tokens: the bytes; mostly words that begin like others,
    half of them behind a blank, as real models have; runs of signs; and numbers of at most three
    digits. It has no merges: nobody encodes by it."""
    rng = random.Random(seed)
    blank = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(" ")[0][0]
    tokens = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    grown = {kind: list(kind) for kind in (_LETTERS, _SIGNS, _DIGITS)}
    while len(tokens) < vocab_size:
        [kind] = rng.choices(list(grown), (90, 8, 2))
        parts = grown[kind]
        longest = 3 if kind == _DIGITS else _LONGEST
        # The early ones are the short ones.
        part = (
            parts[int(len(parts) * rng.random() ** 2)] + parts[int(len(parts) * rng.random() ** 4)]
        )
        token = blank * (kind != _DIGITS and rng.random() < 0.5) + part
        if len(part) <= longest and token not in tokens:
            tokens[token] = None
            parts.append(part)
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


class AnyText:
    """The form that any text has.

    Args:
      vocab_size: V.
    """

    accepts = complete = False

    def __init__(self, vocab_size: int) -> None:
        self._all = np.full(-(-vocab_size // 32), ~np.uint32(0), np.uint32)

    def mask(self) -> np.ndarray:
        return self._all.copy()

    def push(self, token_id: int) -> None:
        """Nothing changes."""


class TimedGuide:
    """A guide whose masks are timed.

    Args:
      guide: what follows the form.
      seconds: gets the time of each mask.
    """

    def __init__(self, guide: SequenceGuide, seconds: list[float]) -> None:
        self._guide, self._seconds = guide, seconds

    @property
    def accepts(self) -> bool:
        return self._guide.accepts

    @property
    def complete(self) -> bool:
        return self._guide.complete

    def mask(self) -> np.ndarray:
        began = perf_counter()
        mask = self._guide.mask()
        self._seconds.append(perf_counter() - began)
        return mask

    def push(self, token_id: int) -> None:
        self._guide.push(token_id)


def form_maker(vocab_size: int) -> Callable[[str], SequenceGuide]:
    """What makes a guide of each of FORMS, at the beginning of a text."""
    compiler = GuideCompiler(random_tokenizer(vocab_size), vocab_size)

    def make(form: str) -> SequenceGuide:
        return AnyText(vocab_size) if form == "any" else compiler.start(_GUIDES[form])

    return make
