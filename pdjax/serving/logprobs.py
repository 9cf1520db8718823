"""Log-probabilities in the two forms of OpenAI's API."""

import math
from collections.abc import Sequence as Seq
from typing import Any

from pdjax.core.logprobs import TokenLogprobs
from pdjax.text.tokenizer import Tokenizer

LOWEST = -9999.0
"""In place of minus infinity, which JSON does not have; vLLM's value."""


class TokenNames:
    """The texts of single tokens.

    Args:
      tokenizer: of the model; None names every token by its id.
      by_id: whether every token is named `token_id:N`, so that no two have one name.
    """

    def __init__(self, tokenizer: Tokenizer | None, *, by_id: bool = False) -> None:
        self._tokenizer = None if by_id else tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        if token not in self._known:
            tokenizer = self._tokenizer
            self._known[token] = (
                f"token_id:{token}"
                if tokenizer is None
                else tokenizer.decode([token], skip_special_tokens=False)
            )
        return self._known[token]


class CompletionLogprobs:
    """Writes the `logprobs` of a choice of `/v1/completions`, piece by piece.

    Args:
      names: of the tokens.
      offset: characters before the first token.
    """

    def __init__(self, names: TokenNames, offset: int = 0) -> None:
        self._names, self._offset = names, offset

    def of(self, token_ids: Seq[int], entries: Seq[TokenLogprobs]) -> dict[str, Any]:
        """The next tokens. Of tokens with the same text the likeliest one stays."""
        tokens = [self._names(token) for token in token_ids]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        tops = []
        for token, entry in zip(tokens, entries, strict=True):
            top: dict[str, float] = {}
            for other, value in entry.top:
                top.setdefault(self._names(other), _finite(value))
            top.setdefault(token, _finite(entry.chosen))
            tops.append(top)
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(entry.chosen) for entry in entries],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def chat_logprobs(
    names: TokenNames, token_ids: Seq[int], entries: Seq[TokenLogprobs]
) -> dict[str, Any]:
    """The `logprobs` of a choice, or of a chunk, of `/v1/chat/completions`."""
    return {
        "content": [
            _named(names, token, entry.chosen)
            | {"top_logprobs": [_named(names, other, value) for other, value in entry.top]}
            for token, entry in zip(token_ids, entries, strict=True)
        ]
    }


def _named(names: TokenNames, token: int, value: float) -> dict[str, Any]:
    text = names(token)
    return {"token": text, "logprob": _finite(value), "bytes": list(text.encode("utf-8"))}


def _finite(value: float) -> float:
    return max(value, LOWEST) if not math.isnan(value) else LOWEST
