"""Decodes token ids to text: all at once, or piece by piece while the tokens arrive.

Both ways give the same text for any tokens. A vocabulary with tokens for single bytes ("byte
fallback") needs a definition for that. The tokenizers package turns a whole run of such bytes into
one U+FFFD a byte as soon as one byte is not part of a character, so a later token would take back
characters already shown. Here, as in SentencePiece, characters stay, and each byte that belongs to
no character becomes one U+FFFD.
"""

import codecs
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import tokenizers

UNKNOWN = "\ufffd"
"""The character for a byte that is not part of a character."""

_BYTE_TOKEN = re.compile(r"<0x(\+[0-9A-Fa-f]|[0-9A-Fa-f]{2})>")
_BYTE_TOKEN_CHARACTERS = frozenset("<>+0123456789abcdefABCDEFx" + UNKNOWN)
_ANCHORS = "aqz.0"
"""Candidates for an anchor: a token that decodes to itself, put before another so that the other
isn't the first token."""


class Detokenizer:
    """The decoding half of a tokenizer.

    Args:
      backend: the vocabulary and decoder; neither may change afterwards.

    Raises:
      BaseException: the decoder fails on an empty text; some decoders fail with a panic.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        # The package skips tokens by text: it does not skip one that its normalizer has changed.
        texts = {token.content for token in added.values() if token.special}
        self._special = frozenset(i for i in added if backend.id_to_token(i) in texts)
        for tokens in ([], [""]):
            self.join(tokens)
        self._rules = _read_rules(backend.decoder)

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of the control tokens."""
        return self._special

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Return the text of `ids`; a byte that is not part of a character becomes U+FFFD."""
        text = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        if self._rules is None or not self._rules.byte_fallback or UNKNOWN not in text:
            return text
        run, tokens = _ByteRun(), []
        for index in ids:
            if (token := self.token(index, skip_special_tokens)) is not None:
                tokens += run.push(token)
        return self.join(tokens + run.flush())

    def token(self, index: int, skip_special_tokens: bool) -> str | None:
        """Return the token `index`; None if it is skipped or unknown."""
        if skip_special_tokens and index in self._special:
            return None
        return self._backend.id_to_token(index)

    def join(self, tokens: list[str]) -> str:
        """Decode tokens with the tokenizer's decoder."""
        decoder = self._backend.decoder
        return " ".join(tokens) if decoder is None else decoder.decode(tokens)

    def stream(self) -> "_Stream":
        """Make the part of an `IncrementalDecoder` that depends on the tokenizer's decoder."""
        if self._rules is None:
            return _WholeStream(self.join)
        return _ByteStream() if self._rules.bytes_only else _TokenStream(self.join, self._rules)


class IncrementalDecoder:
    """Turns a stream of token ids into pieces of text, none of which is ever taken back.

    The pieces together are the end of the text that `Detokenizer.decode` gives for `after` and the
    pushed tokens: the part that these tokens add to, or change in, the text of `after` alone. A
    character that begins in `after` comes whole; a U+FFFD for bytes of `after` does not come.

    A tokenizer's decoder without a local rule, such as one that drops repeated tokens, gives all
    its text at the end.

    Args:
      detokenizer: decodes tokens.
      skip_special_tokens: whether control tokens have no text.
      after: tokens before the stream, such as a prompt.
      shown: control tokens that have a text all the same.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        skip_special_tokens: bool = True,
        after: Sequence[int] = (),
        shown: Iterable[int] = (),
    ) -> None:
        self._token = detokenizer.token
        self._skip = skip_special_tokens
        self._shown = frozenset(shown)
        self._stream = detokenizer.stream()
        self._stream.start(self._tokens(after), self._tokens(reversed(after)))

    def push(self, token_id: int) -> str:
        """Take a new token; return the text that is now certain, possibly empty."""
        token = self._token(token_id, self._skip and token_id not in self._shown)
        return "" if token is None else self._stream.push(token)

    def flush(self) -> str:
        """End the stream; return the text still held back, with U+FFFD for bytes of no
        character."""
        return self._stream.flush()

    def _tokens(self, ids: Iterable[int]) -> Iterator[str]:
        tokens = (self._token(index, self._skip and index not in self._shown) for index in ids)
        return (token for token in tokens if token is not None)


class _Stream(Protocol):
    """The text of a stream of tokens.

    A prompt's last four tokens hold every byte of a character that is not whole yet.
    """

    def start(self, first: Iterator[str], last: Iterator[str]) -> None:
        """Take the tokens before the stream.

        `first` yields them from the first one on, `last` from the last one back, so that a long
        prompt need not be read through where its ends suffice.
        """

    def push(self, token: str) -> str: ...

    def flush(self) -> str: ...


class _WholeStream:
    """The text of any decoder: all of it, at the end."""

    def __init__(self, join: Callable[[list[str]], str]) -> None:
        self._join = join
        self._tokens: list[str] = []
        self._before = ""

    def start(self, first: Iterator[str], last: Iterator[str]) -> None:
        self._tokens = list(first)
        self._before = self._join(self._tokens)

    def push(self, token: str) -> str:
        self._tokens.append(token)
        return ""

    def flush(self) -> str:
        text = self._join(self._tokens)
        same = 0
        while same < min(len(text), len(self._before)) and text[same] == self._before[same]:
            same += 1
        self._before = text
        return text[same:]


class _ByteStream:
    """The text of a byte-level vocabulary: each token is some bytes; all together are UTF-8."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._shown = 0  # U+FFFD shown for bytes before the stream

    def start(self, first: Iterator[str], last: Iterator[str]) -> None:
        for token in [*itertools.islice(filter(None, last), 4)][::-1]:
            self._utf8.decode(_bytes_of(token))
        # Python also holds back half of a surrogate, which becomes two U+FFFD, not one.
        self._shown = len(self._utf8.getstate()[0].decode(errors="replace"))

    def push(self, token: str) -> str:
        return self._new(self._utf8.decode(_bytes_of(token)))

    def flush(self) -> str:
        return self._new(self._utf8.decode(b"", final=True))

    def _new(self, text: str) -> str:
        text, self._shown = _without_leading(UNKNOWN, self._shown, text)
        return text


class _TokenStream:
    """The text of a vocabulary with a local decoder.

    Such a decoder decodes each token alone, except byte tokens, the first token, and blanks before
    the first character.
    """

    def __init__(self, join: Callable[[list[str]], str], rules: "_Rules") -> None:
        self._join, self._rules = join, rules
        self._run = _ByteRun() if rules.byte_fallback else None
        self._first = rules.first_differs
        self._blanks = rules.blanks  # still to be stripped from the start of the text
        self._shown = 0  # U+FFFD shown for bytes before the stream

    def start(self, first: Iterator[str], last: Iterator[str]) -> None:
        while (self._first or self._blanks) and (token := next(first, None)) is not None:
            self._text([token])
        if self._run is not None:
            for token in [*itertools.islice(last, 4)][::-1]:
                self._run.push(token)
            self._shown = self._run.waiting

    def push(self, token: str) -> str:
        return self._new([token] if self._run is None else self._run.push(token))

    def flush(self) -> str:
        return self._new([] if self._run is None else self._run.flush())

    def _new(self, tokens: list[str]) -> str:
        text, self._shown = _without_leading(UNKNOWN, self._shown, self._text(tokens))
        return text

    def _text(self, tokens: list[str]) -> str:
        """Decode tokens that no later token changes."""
        if not tokens:
            return ""
        if self._first:
            self._first = False
            return self._join(tokens)
        anchor = self._rules.anchor
        text = self._join([anchor, *tokens])[len(anchor) :]
        text, self._blanks = _without_leading(self._rules.blank, self._blanks, text)
        return text


def _without_leading(character: str, most: int, text: str) -> tuple[str, int]:
    """Drop at most `most` copies of `character` from the start of a text.

    Return the rest, and how many copies may still be dropped from the text that follows.
    """
    dropped = 0
    while dropped < min(most, len(text)) and text[dropped] == character:
        dropped += 1
    return text[dropped:], most - dropped if dropped == len(text) else 0


class _ByteRun:
    """A run of byte tokens: they pass once they make a character, or become U+FFFD."""

    def __init__(self) -> None:
        self._bytes = b""

    @property
    def waiting(self) -> int:
        """Number of bytes that may still become a character."""
        return len(self._bytes)

    def push(self, token: str) -> list[str]:
        """Take a token; return the tokens that are now certain. Byte tokens among them make whole
        characters."""
        match = _BYTE_TOKEN.fullmatch(token)
        if match is None:
            return [*self.flush(), token]
        self._bytes += bytes([int(match[1], 16)])
        return self._certain(final=False)

    def flush(self) -> list[str]:
        """End the run, since no byte follows; return the tokens that were held back."""
        return self._certain(final=True)

    def _certain(self, final: bool) -> list[str]:
        tokens: list[str] = []
        while self._bytes:
            whole, rest = len(self._bytes), False
            try:
                self._bytes.decode()
            except UnicodeDecodeError as error:
                whole, rest = error.start, error.reason == "unexpected end of data"
            tokens += [f"<0x{byte:02X}>" for byte in self._bytes[:whole]]
            self._bytes = self._bytes[whole:]
            if rest and not final:
                break
            if self._bytes:
                tokens.append(UNKNOWN)
                self._bytes = self._bytes[1:]
        return tokens


class _Rules(NamedTuple):
    """The rules of a local decoder: what a token's text depends on besides the token itself."""

    bytes_only: bool = False
    """Every token is bytes; no other rule applies."""
    byte_fallback: bool = False
    """Some tokens are single bytes."""
    first_differs: bool = False
    """The first token is decoded in another way than the others."""
    blank: str = ""
    blanks: int = 0
    """Most copies of `blank` that the decoder strips from the start of the text."""
    anchor: str = ""
    """A token that goes before others when they are decoded, so that they aren't the first."""


def _read_rules(decoder: Any) -> _Rules | None:
    """Read the rules of a decoder of the tokenizers package; None if the decoder is not local."""
    if decoder is None:
        return _Rules(first_differs=True, anchor=_ANCHORS[0])
    steps = _flatten(json.loads(decoder.__getstate__()))
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds:
        return _Rules(bytes_only=True) if set(kinds) <= {"ByteLevel", "Fuse"} else None
    fused = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    tokenwise, behind = steps[:fused], [step for step in steps[fused:] if step["type"] != "Fuse"]
    if not all(map(_is_local, tokenwise)):
        return None
    fallback = kinds[:fused].count("ByteFallback")
    if fallback:
        place = kinds.index("ByteFallback")
        if not all(map(_keeps_bytes, tokenwise[:place])):
            return None
        if not all(map(_replaces_a_character, tokenwise[place + 1 :])):
            return None  # such a step treats a whole run of bytes as one token
    first = any(step["type"] in ("Metaspace", "WordPiece") for step in tokenwise)
    blank, blanks = _stripped(behind)
    if blanks is None or (blanks and first):
        return None
    anchor = next((text for text in _ANCHORS if decoder.decode([text]) == text), None)
    if anchor is None or anchor == blank:
        return None
    return _Rules(False, bool(fallback), first, blank, blanks, anchor)


def _flatten(step: dict[str, Any]) -> list[dict[str, Any]]:
    if step["type"] != "Sequence":
        return [step]
    return [inner for outer in step["decoders"] for inner in _flatten(outer)]


def _is_local(step: dict[str, Any]) -> bool:
    return step["type"] in ("Replace", "Metaspace", "WordPiece", "Strip", "ByteFallback")


def _keeps_bytes(step: dict[str, Any]) -> bool:
    """Whether this step leaves byte tokens unchanged."""
    if step["type"] == "Metaspace":
        return step["replacement"] not in _BYTE_TOKEN_CHARACTERS
    if step["type"] != "Replace" or not step["pattern"].get("String"):
        return False
    return not _BYTE_TOKEN_CHARACTERS & {*step["pattern"]["String"], *step["content"]}


def _replaces_a_character(step: dict[str, Any]) -> bool:
    return step["type"] == "Replace" and len(step["pattern"].get("String", "")) == 1


def _stripped(behind: list[dict[str, Any]]) -> tuple[str, int | None]:
    """Return the blank and how many the steps after a fusion strip from the start of the text.

    The number is None where the steps do anything else.
    """
    if not behind:
        return "", 0
    step = behind[0]
    if len(behind) > 1 or step["type"] != "Strip" or step["stop"]:
        return "", None
    return step["content"], step["start"]


def _bytes_of(token: str) -> bytes:
    """Return the bytes of a byte-level token; a token with any other character is plain text."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode(errors="replace")


def _byte_of() -> dict[str, int]:
    """Map each of 256 printable characters to its byte, as in GPT-2's vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


_BYTE_OF = _byte_of()
