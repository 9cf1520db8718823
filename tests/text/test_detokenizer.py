"""Token ids to text: pieces add up to the whole text for any tokens, decoder and prompt."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from pdjax.text.detokenizer import Detokenizer, IncrementalDecoder

FIRE = "🔥".encode()
LETTERS = ["▁", "a", "▁a", "▁▁", "é", "", "🔥", "\ufffd", " ", "##b", "c</w>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def backend(tokens: list[str], decoder: Any) -> Backend:
    made = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    made.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    made.add_tokens([AddedToken("x é", normalized=False)])
    if decoder is not None:
        made.decoder = decoder
    return made


def byte_fallback(*steps: Any) -> Detokenizer:
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), "<s>", *LETTERS]
    return Detokenizer(backend(tokens, decoders.Sequence(list(steps)) if steps else None))


def byte_level() -> Detokenizer:
    order = [symbol for _, symbol in sorted((_byte_of(symbol), symbol) for symbol in BYTES)]
    return Detokenizer(backend([*order, "<s>", "", "ĠĠa"], decoders.ByteLevel()))


def _byte_of(symbol: str) -> int:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return ord(symbol) if ord(symbol) < 256 else others[ord(symbol) - 256]


REPLACE, BYTE_FALLBACK, FUSE = (
    decoders.Replace("▁", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
)
DETOKENIZERS: dict[str, Callable[[], Detokenizer]] = {
    "byte level": byte_level,
    "llama": lambda: byte_fallback(REPLACE, BYTE_FALLBACK, FUSE, decoders.Strip(" ", 1, 0)),
    "three blanks": lambda: byte_fallback(REPLACE, BYTE_FALLBACK, FUSE, decoders.Strip(" ", 3, 0)),
    "gemma": lambda: byte_fallback(REPLACE, BYTE_FALLBACK, FUSE),
    "replaced later": lambda: byte_fallback(BYTE_FALLBACK, REPLACE, FUSE),
    "metaspace": lambda: byte_fallback(decoders.Metaspace()),
    "metaspace and bytes": lambda: byte_fallback(decoders.Metaspace("▁", "first"), BYTE_FALLBACK),
    "strip each": lambda: byte_fallback(decoders.Strip(" ", 1, 0)),
    "word pieces": lambda: byte_fallback(decoders.WordPiece()),
    "no decoder": byte_fallback,
    # These have no local rule.
    "strip each run": lambda: byte_fallback(REPLACE, BYTE_FALLBACK, decoders.Strip(" ", 1, 0)),
    "suffixes": lambda: byte_fallback(decoders.BPEDecoder()),
    "ctc": lambda: byte_fallback(decoders.CTC()),
    "replaced together": lambda: byte_fallback(FUSE, decoders.Replace("aa", "b")),
}


def some_ids(rng: random.Random, most: int) -> list[int]:
    """Draw bytes of characters, often cut, and other tokens; some ids have no token."""
    ids: list[int] = []
    for _ in range(rng.randint(0, most)):
        if rng.random() < 0.6:
            ids += rng.choice("🔥é日aß▁\ufffd").encode()[: rng.randint(1, 4)]
        else:
            ids.append(rng.randrange(256) if rng.random() < 0.3 else rng.randrange(256, 272))
    return ids


def streamed(
    detokenizer: Detokenizer, ids: list[int], skip: bool = True, after: list[int] | None = None
) -> str:
    decoder = IncrementalDecoder(detokenizer, skip, after or [])
    pieces = [decoder.push(index) for index in ids] + [decoder.flush()]
    return "".join(pieces)


def common(a: str, b: str) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


@pytest.mark.parametrize("name", DETOKENIZERS)
def test_pieces_add_up_to_the_whole(name: str):
    detokenizer, rng = DETOKENIZERS[name](), random.Random(3)
    for _ in range(200):
        ids, skip = some_ids(rng, 8), rng.random() < 0.5
        assert streamed(detokenizer, ids, skip) == detokenizer.decode(ids, skip)


@pytest.mark.parametrize("name", DETOKENIZERS)
def test_control_tokens_that_are_shown_are_not_skipped(name: str):
    detokenizer, rng = DETOKENIZERS[name](), random.Random(6)
    [special] = detokenizer.special_ids
    for _ in range(50):
        ids = [*some_ids(rng, 4), special, *some_ids(rng, 4)]
        for shown, skip in (((special,), False), ((special + 1,), True)):
            decoder = IncrementalDecoder(detokenizer, shown=shown)
            text = "".join([*map(decoder.push, ids), decoder.flush()])
            assert text == detokenizer.decode(ids, skip)


@pytest.mark.parametrize("name", DETOKENIZERS)
def test_after_a_prompt_they_are_what_the_whole_has_more(name: str):
    """The prompt may end inside a character, and may have no text at all."""
    detokenizer, rng = DETOKENIZERS[name](), random.Random(4)
    for _ in range(200):
        prompt, ids, skip = some_ids(rng, 5), some_ids(rng, 6), rng.random() < 0.5
        whole, before = (detokenizer.decode(i, skip) for i in (prompt + ids, prompt))
        assert streamed(detokenizer, ids, skip, prompt) == whole[common(whole, before) :]


@pytest.mark.parametrize("name", ["byte level", "llama"])
def test_random_bytes(name: str):
    detokenizer, rng = DETOKENIZERS[name](), random.Random(5)
    for _ in range(1000):
        ids = rng.choices(range(256), k=rng.randint(1, 12))
        assert streamed(detokenizer, ids) == detokenizer.decode(ids, True)


def test_characters_stay_beside_bytes_that_are_none():
    """Each byte that is not part of a character becomes U+FFFD, as in SentencePiece."""
    llama = DETOKENIZERS["llama"]()
    assert llama.decode([*FIRE, *FIRE[:3]], True) == "🔥\ufffd\ufffd\ufffd"
    assert llama.decode([*FIRE[:2], *"é".encode(), 0xFF, 0x41], True) == "\ufffd\ufffdé\ufffdA"
    assert llama.decode([0xED, 0xA0, 0x80], True) == "\ufffd" * 3  # a surrogate isn't a character
    decoder = IncrementalDecoder(llama)
    assert [decoder.push(byte) for byte in FIRE] == ["", "", "", "🔥"]
    assert [decoder.push(byte) for byte in FIRE[:3]] == ["", "", ""]
    assert decoder.push(258) == "\ufffd\ufffd\ufffda"
    assert decoder.flush() == ""


def test_a_byte_level_vocabulary_replaces_as_utf8_does():
    level = byte_level()
    ids = [*FIRE, *FIRE[:3], 0x41, 0xFF, *"é".encode()]
    assert level.decode(ids, True) == bytes(ids).decode(errors="replace") == "🔥\ufffdA\ufffdé"
    assert streamed(level, ids) == "🔥\ufffdA\ufffdé"


@pytest.mark.parametrize("name", ["byte level", "llama"])
def test_a_character_that_begins_in_the_prompt_comes_whole(name: str):
    detokenizer = DETOKENIZERS[name]()
    decoder = IncrementalDecoder(detokenizer, after=[0x41, *FIRE[:3]])
    assert decoder.push(FIRE[3]) == "🔥"
    decoder = IncrementalDecoder(detokenizer, after=[0x41, *FIRE[:3]])
    assert decoder.push(0x42) == "B"  # the U+FFFD belongs to the prompt


def test_half_a_surrogate_in_the_prompt_is_the_prompts():
    level = byte_level()
    prompt = [0xED, 0xAD]
    assert level.decode(prompt, True) == "\ufffd\ufffd"
    assert streamed(level, list("é".encode()), after=prompt) == "é"
    assert streamed(level, [0xB2], after=prompt) == "\ufffd"


def test_long_runs_without_a_character_wait_for_nothing():
    llama, level = DETOKENIZERS["llama"](), byte_level()
    for detokenizer in (llama, level):
        decoder = IncrementalDecoder(detokenizer)
        shown = [len(decoder.push(0x80)) for _ in range(2000)]
        assert shown == [1] * 2000
    assert streamed(llama, [0xC3] * 2000) == "\ufffd" * 2000


def test_a_long_prompt_is_not_read_through(monkeypatch: pytest.MonkeyPatch):
    llama = DETOKENIZERS["llama"]()
    read = 0
    token = llama.token

    def counted(index: int, skip: bool) -> str | None:
        nonlocal read
        read += 1
        return token(index, skip)

    monkeypatch.setattr(llama, "token", counted)
    IncrementalDecoder(llama, after=[258] * 100_000)
    assert read < 10
