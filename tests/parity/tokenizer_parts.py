# ruff: noqa: E501, RUF001 (the strings are meant to be easily confused)
"""Parts of the tokenizer directories of tokenizer_cases.py: made-up vocabularies, and strings that
tell the directories apart."""

import random
import struct
from collections.abc import Iterable
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [
    ("l", "o"), ("lo", "w"), ("Ġ", "low"), ("e", "r"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he"),
    ("1", "2"), ("12", "3"), ("Ã", "©"), ("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("Ċ", "Ċ"), ("'", "s"),
]  # fmt: skip
STRINGS = [
    "", " ", "   ", "\n", "low", " low", "  low", "low lower  the lows", "the  the", "\tthe\n\n low",
    "12345 123 1 23", "don't it's THE'S", "café naïve", "cafe\u0301", "日本語 テキスト", "😀👨‍👩‍👧 🇫🇷",
    "<s>", "<s>low", "low<s>", " <s> low </s> ", "a<|im_end|>b", "a <|im_end|> b", "<|im_end|>\n",
    "<|im_start|>user\nlow<|im_end|>\n", "<image>low<image>", "<unk> <pad>", "<|endoftext|>",
    "x<|endoftext|>y", "STRIPS  me", "a STRIPL b", "a STRIPR b", "wordy word words word", "WORD word",
    "NORM norm", "é NORMÉ", "▁low", " ▁ low▁", "low▁low", "<0x0A>", "user defined", "xuser definedx",
    "tok1 tok2tok3", "TOOL low TOOL", "\u00a0low\u200b", "\r\nlow\r", "ﬁ Ⅷ ½", "a\x00b", "\ufeffx",
    "low" * 20, "l o w e r", "the<s>the</s>the", "😀<s>😀", "[INST] low [/INST]", "a  <|im_end|>  b",
    "\u3000low", "ＬＯＷ", "ａ  ｂ ", " leading and trailing ", "ab  cd", "abcd bcd", "ab\ncd", "<mask>",
]  # fmt: skip


def strings() -> list[str]:
    """Return the strings above, and more that combine them."""
    rng = random.Random(7)
    parts = STRINGS + list("ab cdel owthr▁12é日\n\t")
    return STRINGS + ["".join(rng.choices(parts, k=rng.randint(1, 6))) for _ in range(238)]


def byte_level(**changes: Any) -> Tokenizer:
    """Make a byte-level BPE with some merges, and `<s>`, `</s>` among its added tokens."""
    vocab = {text: i for i, text in enumerate([*BYTES, *(a + b for a, b in MERGES)])}
    tokenizer = Tokenizer(models.BPE(vocab, MERGES))
    tokenizer.pre_tokenizer = changes.get("cut", pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.normalizer = changes.get("normalizer")
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>")])
    if changes.get("around"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", len(vocab))]
        )
    return tokenizer


PIECES: list[tuple[str, float, int]] = [
    ("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3),
    *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)),
    ("▁▁", -1.0, 1), ("ab", -1.5, 1), ("▁t", -2.0, 1), ("cd", -2.5, 1), ("bc", -1.2, 1),
    ("lo", -3.0, 1), ("▁lo", -3.5, 1), ("low", -2.9, 1), ("▁low", -4.0, 1), ("he", -4.5, 1),
    ("abcd", -5.0, 1), ("bcd", -5.1, 1), ("user defined", 0.0, 4), ("TOOL", 0.0, 3),
    ("tok1", 0.0, 4),
    *((letter, -20.0 - i, 1) for i, letter in enumerate("▁abcdehlotrw")),
]  # fmt: skip


def byte_fallback() -> Tokenizer:
    """Make the tokenizer that `tokenizer.json` of an old Llama holds."""
    vocab = {text: i for i, (text, _, _) in enumerate(PIECES)}
    order = sorted(PIECES[259:], key=lambda piece: -piece[1])
    merges = [
        (text[:cut], text[cut:])
        for text, _, _ in order
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def sentencepiece(
    pieces: Iterable[tuple[str, float, int]] = PIECES, model_type: int = 2, **spec: int
) -> bytes:
    """Write a SentencePiece model; `spec` are fields of its normalizer, by number."""
    data = b"".join(
        _field(1, _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind))
        for text, score, kind in pieces
    )
    trainer = _number(3, model_type) + _number(35, 1) + _number(40, 0) + _number(41, 1)
    normalizer = b"".join(_number(int(name[1:]), value) for name, value in spec.items())
    return data + _field(2, trainer + _number(42, 2)) + _field(3, normalizer)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def token(content: str, **flags: bool) -> dict[str, Any]:
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"content": content, **dict.fromkeys(names, False), **flags}
