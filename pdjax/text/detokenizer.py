"""Token ids to text: all at once, or piece by piece while the tokens arrive.

Both give the same text, whatever the tokens are. That takes a definition where a vocabulary has
tokens for single bytes ("byte fallback"): the tokenizers package turns a run of such bytes into one
U+FFFD a byte as soon as one of them is no part of a character, so that a later token would take
back characters already shown. Here, as in SentencePiece, characters stay, and each byte that
belongs to none is one U+FFFD.
"""

import codecs
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import tokenizers

UNKNOWN = "\ufffd"
"""Stands for a byte that is no part of a character."""

_BYTE_TOKEN = re.compile(r"<0x(\+[0-9A-Fa-f]|[0-9A-Fa-f]{2})>")
_OF_BYTE_TOKENS = frozenset("<>+0123456789abcdefABCDEFx" + UNKNOWN)
_ANCHORS = "aqz.0"
"""Texts to put before a token so that it isn't the first one; one of them decodes to itself."""


class Detokenizer:
    """The decoding half of a tokenizer.

    Args:
      backend: its vocabulary and decoder, which must not change any more.

    Raises:
      BaseException: the decoder fails on the emptiest of texts; some fail with a panic.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        # The package goes by text: a token that its normalizer has changed isn't skipped.
        texts = {token.content for token in added.values() if token.special}
        self._special = frozenset(i for i in added if backend.id_to_token(i) in texts)
        for tokens in ([], [""]):
            self.join(tokens)
        self._rules = _read_rules(backend.decoder)

    @property
    def special_ids(self) -> frozenset[int]:
        """Control tokens."""
        return self._special

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of `ids`; a byte that is no part of a character becomes U+FFFD."""
        text = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        if self._rules is None or not self._rules.byte_fallback or UNKNOWN not in text:
            return text
        run, tokens = _ByteRun(), []
        for index in ids:
            if (token := self.token(index, skip_special_tokens)) is not None:
                tokens += run.push(token)
        return self.join(tokens + run.flush())

    def token(self, index: int, skip_special_tokens: bool) -> str | None:
        """The token `index`; None if it is skipped or unknown."""
        if skip_special_tokens and index in self._special:
            return None
        return self._backend.id_to_token(index)

    def join(self, tokens: list[str]) -> str:
        """Text of tokens, as the tokenizer's decoder has it."""
        decoder = self._backend.decoder
        return " ".join(tokens) if decoder is None else decoder.decode(tokens)

    def stream(self) -> "_Stream":
        """What turns tokens into text as they come; see `IncrementalDecoder`."""
        if self._rules is None:
            return _WholeStream(self.join)
        return _ByteStream() if self._rules.bytes_only else _TokenStream(self.join, self._rules)


class IncrementalDecoder:
    """Turns a stream of token ids into text that never has to be taken back.

    The text of all pieces is the end of what `Detokenizer.decode` makes of `after` and the tokens
    pushed: what they add to, or change in, the text of `after` alone. A character that begins in
    `after` comes whole; U+FFFD for bytes of `after` doesn't come.

    A decoder that has no local rule, such as one that drops repeated tokens, gives its text at the
    end.

    Args:
      detokenizer: knows the vocabulary.
      skip_special_tokens: whether control tokens have no text.
      after: tokens before the stream, such as a prompt.
    """

    def __init__(
        self, detokenizer: Detokenizer, skip_special_tokens: bool = True, after: Sequence[int] = ()
    ) -> None:
        self._token_of = detokenizer.token
        self._skip = skip_special_tokens
        self._stream = detokenizer.stream()
        self._stream.start(self._tokens(after), self._tokens(reversed(after)))
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All text given out so far."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def push(self, token_id: int) -> str:
        """Take a new token; the text that has become certain, possibly empty."""
        token = self._token_of(token_id, self._skip)
        if token is None:
            return ""
        return self._give(self._stream.push(token))

    def flush(self) -> str:
        """End of the stream: the text still held back, with U+FFFD for what is no character."""
        return self._give(self._stream.flush())

    def _tokens(self, ids: Iterable[int]) -> Iterator[str]:
        tokens = (self._token_of(index, self._skip) for index in ids)
        return (token for token in tokens if token is not None)

    def _give(self, text: str) -> str:
        if text:
            self._pieces.append(text)
        return text


class _Stream(Protocol):
    """Text of a stream of tokens. The four last tokens of a prompt hold every byte of a character
    that isn't whole."""

    def start(self, first: Iterator[str], last: Iterator[str]) -> None:
        """Take the tokens before the stream, whose text is known, from their first on and from
        their last on. A long prompt isn't read through where its ends suffice."""

    def push(self, token: str) -> str: ...

    def flush(self) -> str: ...


class _WholeStream:
    """Text of any decoder: all of it, at the end."""

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
    """Text of a byte-level vocabulary: each token is some bytes, which together are UTF-8."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._shown = 0  # U+FFFD shown for bytes before the stream

    def start(self, first: Iterator[str], last: Iterator[str]) -> None:
        for token in [*itertools.islice(filter(None, last), 4)][::-1]:
            self._utf8.decode(_bytes_of(token))
        # Python waits at half of a surrogate, which is two characters U+FFFD, not one.
        self._shown = len(self._utf8.getstate()[0].decode(errors="replace"))

    def push(self, token: str) -> str:
        return self._new(self._utf8.decode(_bytes_of(token)))

    def flush(self) -> str:
        return self._new(self._utf8.decode(b"", final=True))

    def _new(self, text: str) -> str:
        text, self._shown = _without(UNKNOWN, self._shown, text)
        return text


class _TokenStream:
    """Text of a vocabulary whose decoder treats each token for itself, but for bytes, for the first
    token, and for blanks before the first character.
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
        text, self._shown = _without(UNKNOWN, self._shown, self._text(tokens))
        return text

    def _text(self, tokens: list[str]) -> str:
        """Text of tokens that need no token after them."""
        if not tokens:
            return ""
        if self._first:
            self._first = False
            return self._join(tokens)
        anchor = self._rules.anchor
        text = self._join([anchor, *tokens])[len(anchor) :]
        text, self._blanks = _without(self._rules.blank, self._blanks, text)
        return text


def _without(character: str, most: int, text: str) -> tuple[str, int]:
    """A text without the first of its characters, where they are `character`, and how many more are
    to be left out of what follows; they are `most` at most."""
    dropped = 0
    while dropped < min(most, len(text)) and text[dropped] == character:
        dropped += 1
    return text[dropped:], most - dropped if dropped == len(text) else 0


class _ByteRun:
    """Byte tokens in a row: they pass once they make a character, or become U+FFFD."""

    def __init__(self) -> None:
        self._bytes = b""

    @property
    def waiting(self) -> int:
        """Bytes that may still become a character."""
        return len(self._bytes)

    def push(self, token: str) -> list[str]:
        """Tokens that have become certain; all bytes among them are those of characters."""
        match = _BYTE_TOKEN.fullmatch(token)
        if match is None:
            return [*self.flush(), token]
        self._bytes += bytes([int(match[1], 16)])
        return self._certain(final=False)

    def flush(self) -> list[str]:
        """The same where no byte follows."""
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
    """What the text of a token depends on besides the token itself."""

    bytes_only: bool = False
    """Tokens are bytes, and nothing else counts."""
    byte_fallback: bool = False
    """Some tokens are bytes."""
    first_differs: bool = False
    """The first token is decoded in another way than the others."""
    blank: str = ""
    blanks: int = 0
    """So many `blank` at most are taken off the start of the text."""
    anchor: str = ""
    """A token to decode the others after."""


def _read_rules(decoder: Any) -> _Rules | None:
    """The rules of a decoder of the tokenizers package; None if its text is not local."""
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
            return None  # a whole run of bytes counts as one token
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
    """Whether the tokens of bytes are the same behind this step as before it."""
    if step["type"] == "Metaspace":
        return step["replacement"] not in _OF_BYTE_TOKENS
    if step["type"] != "Replace" or not step["pattern"].get("String"):
        return False
    return not _OF_BYTE_TOKENS & {*step["pattern"]["String"], *step["content"]}


def _replaces_a_character(step: dict[str, Any]) -> bool:
    return step["type"] == "Replace" and len(step["pattern"].get("String", "")) == 1


def _stripped(behind: list[dict[str, Any]]) -> tuple[str, int | None]:
    """The blank, and how many of it steps behind a fusion take off the start; None where they do
    anything else."""
    if not behind:
        return "", 0
    step = behind[0]
    if len(behind) > 1 or step["type"] != "Strip" or step["stop"]:
        return "", None
    return step["content"], step["start"]


def _bytes_of(token: str) -> bytes:
    """Bytes of a token of a byte-level vocabulary; a token with any other character is text."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode(errors="replace")


def _byte_of() -> dict[str, int]:
    """The byte that each of 256 printable characters stands for; as in GPT-2's vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


_BYTE_OF = _byte_of()
