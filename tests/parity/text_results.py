"""Results that the parity tests of text compare: digests, short enough to be committed."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer as Backend

from tests.parity import tokenizer_parts

GROUP = 8
"""Number of strings that share a digest."""


def digest(value: Any) -> str:
    """Return ten hexadecimal digits that identify a value."""
    text = json.dumps(value, ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def added_tokens(backend: Backend) -> list[list[Any]]:
    """List added tokens and their flags, in order of their ids."""
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    added = sorted(backend.get_added_tokens_decoder().items())
    return [[index, *(getattr(token, name) for name in names)] for index, token in added]


def cut(
    encode: Callable[[str, bool], list[int]], decode: Callable[[list[int], bool], str]
) -> list[str]:
    """Return digests of all strings' ids, with and without tokens around them, and of their
    texts."""
    results = []
    for text in tokenizer_parts.strings():
        ids = encode(text, True)
        results.append([text, ids, encode(text, False), decode(ids, True), decode(ids, False)])
    return [digest(results[i : i + GROUP]) for i in range(0, len(results), GROUP)]
