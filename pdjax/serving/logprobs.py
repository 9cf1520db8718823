"""Log-probabilities in the two forms of OpenAI's API."""

import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import Any

from pdjax.core.logprobs import PromptLogprobs, TokenLogprobs
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
      most: how many of the likeliest tokens are written.
      offset: characters before the first token that was generated.
    """

    def __init__(self, names: TokenNames, most: int, offset: int = 0) -> None:
        self._names, self._most, self._offset = names, most, offset

    def of(self, token_ids: Seq[int], entries: Seq[TokenLogprobs]) -> dict[str, Any]:
        """The next tokens that were generated."""
        offsets = []
        for token in token_ids:
            offsets.append(self._offset)
            self._offset += len(self._names(token))
        return self._written(token_ids, entries, offsets)

    def of_prompt(
        self, entries: PromptLogprobs, token_ids: Seq[int], offsets: list[int]
    ) -> dict[str, Any]:
        """The tokens of the prompt, the first of which has no log-probability."""
        return self._written(token_ids, entries, offsets)

    def _written(
        self, token_ids: Seq[int], entries: Iterable[TokenLogprobs | None], offsets: list[int]
    ) -> dict[str, Any]:
        tokens = [self._names(token) for token in token_ids]
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        for token, entry in zip(tokens, entries, strict=True):
            values.append(None if entry is None else _finite(entry.chosen))
            tops.append(None if entry is None else self._top(token, entry))
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _top(self, token: str, entry: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens and the one that is there. Of tokens with the same text the
        likeliest one stays."""
        top: dict[str, float] = {}
        for other, value in entry.top[: self._most]:
            top.setdefault(self._names(other), _finite(value))
        top.setdefault(token, _finite(entry.chosen))
        return top


def offsets_of(tokenizer: Tokenizer | None, token_ids: Seq[int], text: str) -> list[int]:
    """Where in the text of a prompt each of its tokens begins, characters. A token that the text
    does not show has no characters there."""
    if tokenizer is None:
        return [0] * len(token_ids)
    hides = tokenizer.decode(token_ids, skip_special_tokens=False) != text
    decoder, offsets, length = tokenizer.incremental_decoder(hides), list[int](), 0
    for token in token_ids:
        offsets.append(length)
        length += len(decoder.push(token))
    return offsets


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


def prompt_logprobs(
    names: TokenNames, entries: PromptLogprobs | None, most: int
) -> list[dict[str, Any] | None] | None:
    """`prompt_logprobs` in the form of vLLM's server: of each token of the prompt but the first,
    that token and the `most` likeliest ones, by id."""
    if entries is None:
        return None
    written: list[dict[str, Any] | None] = []
    for entry in entries:
        if entry is None:
            written.append(None)
            continue
        places = [(entry.token, entry.chosen, entry.rank)]
        places += [(*each, rank) for rank, each in enumerate(entry.top[:most], start=1)]
        found: dict[str, Any] = {}
        for token, value, rank in places:
            told = {"logprob": _finite(value), "rank": rank, "decoded_token": names(token)}
            found.setdefault(str(token), told)
        written.append(found)
    return written


def _named(names: TokenNames, token: int, value: float) -> dict[str, Any]:
    text = names(token)
    return {"token": text, "logprob": _finite(value), "bytes": list(text.encode("utf-8"))}


def _finite(value: float) -> float:
    return max(value, LOWEST) if not math.isnan(value) else LOWEST
