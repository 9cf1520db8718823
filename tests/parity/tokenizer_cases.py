# ruff: noqa: E501, RUF001 (strings that are easy to take for others are what is asked for)
"""Small tokenizer directories with every way of naming tokens and rules, and strings that tell them
apart.

Vocabularies are made up; the files are those of released models.
"""

import json
import random
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
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
    """The strings above, and more that are put together from them."""
    rng = random.Random(7)
    parts = STRINGS + list("ab cdel owthr▁12é日\n\t")
    return STRINGS + ["".join(rng.choices(parts, k=rng.randint(1, 6))) for _ in range(238)]


def byte_level(**changes: Any) -> Tokenizer:
    """A byte-level BPE with some merges, and `<s>`, `</s>` among its added tokens."""
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
    """What `tokenizer.json` of an old Llama holds."""
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
    """A SentencePiece model; `spec` are fields of its normalizer, by number."""
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


def _token(content: str, **flags: bool) -> dict[str, Any]:
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"content": content, **dict.fromkeys(names, False), **flags}


_SIZE = len(BYTES) + len(MERGES) + 2
LISTED = {
    str(_SIZE - 2): _token("<s>", special=True),
    str(_SIZE - 1): _token("</s>", special=True),
    str(_SIZE): _token("<|im_end|>", special=True),
    str(_SIZE + 1): _token("STRIPL", lstrip=True),
    str(_SIZE + 2): _token("STRIPR", rstrip=True, special=True),
    str(_SIZE + 3): _token("STRIPS", lstrip=True, rstrip=True),
    str(_SIZE + 4): _token("word", single_word=True, normalized=True),
    str(_SIZE + 5): _token("NORM", normalized=True),
    str(_SIZE + 6): _token("tok1"),
}

Files = dict[str, Any]
"""Content by name of the file: a Tokenizer, bytes, text, or what becomes JSON."""

_FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
_LLAMA = {"model_type": "llama"}
_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def directories() -> dict[str, Files]:
    """All directories by name."""
    return {**_byte_level_directories(), **_llama_directories(), **_other_directories()}


def _byte_level_directories() -> dict[str, Files]:
    spaces = normalizers.Sequence([normalizers.Lowercase(), normalizers.NFKC()])
    return {
        "listed_in_config": {
            "tokenizer.json": byte_level(around=True),
            "tokenizer_config.json": {**_FAST, **_TOKENS, "added_tokens_decoder": LISTED},
            "config.json": _LLAMA,
        },
        "listed_and_normalized": {
            "tokenizer.json": byte_level(normalizer=spaces),
            "tokenizer_config.json": {**_FAST, "added_tokens_decoder": LISTED},
        },
        "listed_out_of_order": {
            "tokenizer.json": byte_level(),
            "tokenizer_config.json": {
                "added_tokens_decoder": {
                    "900": _token("tok2"),
                    "899": _token("tok1", special=True),
                    "7": _token("the"),
                },
                "added_tokens": "ignored",
            },
            "added_tokens.json": {"tok3": 901},
            "special_tokens_map.json": {"pad_token": "<pad>"},
        },
        "added_tokens_file": {
            "tokenizer.json": byte_level(),
            "tokenizer_config.json": {**_FAST, "eos_token": "<|im_end|>"},
            "added_tokens.json": {"<|im_end|>": _SIZE, "<|im_start|>": _SIZE + 1, "NORM": 999},
            "config.json": _LLAMA,
        },
        "special_tokens_file": {
            "tokenizer.json": byte_level(around=True),
            "tokenizer_config.json": {"bos_token": "low", "pad_token": None},
            "special_tokens_map.json": {
                "bos_token": _token("<s>", lstrip=True),
                "eos_token": "<|im_end|>",
                "pad_token": _token("<pad>", rstrip=True),
                "additional_special_tokens": ["<|im_start|>", "tok1"],
                "image_token": "<image>",
            },
        },
        "additional_in_both": {
            "tokenizer.json": byte_level(),
            "tokenizer_config.json": {"additional_special_tokens": ["<|im_end|>", "the"]},
            "special_tokens_map.json": {
                "additional_special_tokens": ["<|im_start|>"],
                "mask_token": _token("<mask>", lstrip=True),
            },
            "added_tokens.json": {"<|im_end|>": 600, "<mask>": 601, "<|im_start|>": 602},
        },
        "extra_list": {
            "tokenizer.json": byte_level(),
            "tokenizer_config.json": {"extra_special_tokens": ["<|im_end|>", "tok1"], **_TOKENS},
            "special_tokens_map.json": {
                "extra_special_tokens": [{"content": "STRIPS", "rstrip": True}, "tok1"]
            },
        },
        "extra_named": {
            "tokenizer.json": byte_level(),
            "tokenizer_config.json": {
                "extra_special_tokens": {"image_token": "<image>", "boi_token": "tok1"},
                "audio_token": "tok2",
                "eos_token": {"__type": "AddedToken", **_token("</s>", lstrip=True)},
                "added_tokens_decoder": {},
            },
        },
        "not_special_in_list": {
            "tokenizer.json": byte_level(),
            "tokenizer_config.json": {
                "eos_token": "<|im_end|>",
                "added_tokens_decoder": {str(_SIZE): _token("<|im_end|>", normalized=True)},
            },
        },
        "asked_for_around": {
            "tokenizer.json": byte_level(),
            "tokenizer_config.json": {**_TOKENS, "add_bos_token": True, "add_eos_token": True},
        },
        "split_special": {
            "tokenizer.json": byte_level(around=True),
            "tokenizer_config.json": {**_TOKENS, "split_special_tokens": True},
        },
        "padded": {"tokenizer.json": _padded(), "tokenizer_config.json": {"bos_token": "<s>"}},
        "nothing_else": {"tokenizer.json": byte_level()},
        "llama_class_over_bytes": {
            "tokenizer.json": byte_level(around=True),
            "tokenizer_config.json": {**_TOKENS, "tokenizer_class": "LlamaTokenizer"},
            "config.json": _LLAMA,
        },
        "qwen2_over_its_file": {
            "tokenizer.json": byte_level(
                cut=pre_tokenizers.Sequence(
                    [
                        pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s+"), behavior="isolated"),
                        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                    ]
                )
            ),
            "tokenizer_config.json": {**_FAST, "added_tokens_decoder": LISTED},
            "config.json": {"model_type": "qwen2"},
        },
        "qwen3_by_class": {
            "tokenizer.json": byte_level(),
            "tokenizer_config.json": {
                "tokenizer_class": "Qwen2TokenizerFast",
                "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>",
                "add_prefix_space": True,
            },
            "config.json": {"model_type": "qwen3"},
        },
        "gpt2_class": {
            "tokenizer.json": byte_level(normalizer=normalizers.Lowercase(), around=True),
            "tokenizer_config.json": {"tokenizer_class": "GPT2TokenizerFast", **_TOKENS},
            "config.json": _LLAMA,
        },
        "neox_class_of_model": {
            "tokenizer.json": byte_level(),
            "config.json": {**_LLAMA, "tokenizer_class": "GPTNeoXTokenizer"},
        },
        "unknown_class": {
            "tokenizer.json": byte_level(normalizer=normalizers.Lowercase()),
            "tokenizer_config.json": {"tokenizer_class": "SomeTokenizer", **_TOKENS},
            "config.json": _LLAMA,
        },
    }


def _padded() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.enable_padding(pad_token="<pad>", pad_id=3, length=8)
    tokenizer.enable_truncation(4)
    return tokenizer


def _llama_directories() -> dict[str, Files]:
    named = {"tokenizer_class": "LlamaTokenizer", **_TOKENS}
    listed = {str(i): _token(PIECES[i][0], special=True) for i in range(3)}
    more = {**listed, "900": _token("<|im_end|>", special=True), "901": _token("tok2")}
    found: dict[str, Files] = {}
    variants: dict[str, dict[str, Any]] = {
        "new": {},
        "legacy": {"legacy": True},
        "legacy_null": {"legacy": None, "add_prefix_space": None},
        "not_legacy": {"legacy": False, "added_tokens_decoder": more},
        "no_prefix": {"add_prefix_space": False, "add_eos_token": True},
    }
    for name, changes in variants.items():
        found[f"llama_{name}"] = {
            "tokenizer.json": byte_fallback(),
            "tokenizer_config.json": {**named, **changes},
            "config.json": _LLAMA,
        }
        found[f"llama_pieces_{name}"] = {
            "tokenizer.model": sentencepiece(),
            "tokenizer_config.json": {**named, "add_bos_token": True, **changes},
            "config.json": _LLAMA,
        }
    found["llama_file_as_it_is"] = {
        "tokenizer.json": byte_fallback(),
        "tokenizer_config.json": {**_FAST, "added_tokens_decoder": more},
        "config.json": _LLAMA,
    }
    found["mistral_over_its_class"] = {
        "tokenizer.json": byte_fallback(),
        "tokenizer_config.json": {**named, "legacy": False},
        "config.json": {"model_type": "mistral"},
    }
    found["code_llama"] = {
        "tokenizer.json": byte_fallback(),
        "tokenizer_config.json": {
            "tokenizer_class": "CodeLlamaTokenizer",
            "legacy": True,
            "suffix_token": None,
        },
        "config.json": _LLAMA,
    }
    found["code_llama_pieces"] = {
        "tokenizer.model": sentencepiece(),
        "tokenizer_config.json": {
            "tokenizer_class": "CodeLlamaTokenizerFast",
            "add_prefix_space": False,
            **_TOKENS,
            "add_bos_token": False,
            "add_eos_token": True,
            "added_tokens_decoder": listed,
        },
        "config.json": _LLAMA,
    }
    found["llama_pieces_bare"] = {
        "tokenizer.model": sentencepiece(),
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizerFast"},
    }
    return found


def _other_directories() -> dict[str, Files]:
    vocab = {text: i for i, text in enumerate([*BYTES, *(a + b for a, b in MERGES)])}
    words: Files = {
        "vocab.json": vocab,
        "merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES),
    }
    renamed = {"264": _token("tok2"), "277": _token("TOOL", special=True), "300": _token("tok3")}
    unigram = [(text, score if kind == 1 else 0.0, kind) for text, score, kind in PIECES]
    return {
        "gpt2_words": {
            **words,
            "tokenizer_config.json": {
                "tokenizer_class": "GPT2Tokenizer",
                "add_prefix_space": True,
                "add_bos_token": True,
            },
        },
        "qwen2_words": {
            **words,
            "tokenizer_config.json": {
                "tokenizer_class": "Qwen2Tokenizer",
                "added_tokens_decoder": {
                    "270": _token("<|endoftext|>", special=True),
                    "271": _token("<|im_start|>", special=True),
                    "272": _token("<|im_end|>", special=True),
                },
                "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
                "eos_token": "<|im_end|>",
            },
            "config.json": {"model_type": "qwen2"},
        },
        "pieces_without_class": {"tokenizer.model": sentencepiece(), "config.json": _LLAMA},
        "pieces_new": {
            "tokenizer.model": sentencepiece(f4=0),
            "tokenizer_config.json": {"legacy": False, "add_bos_token": True, **_FAST},
        },
        "pieces_no_prefix": {
            "tokenizer.model": sentencepiece(f3=0, f4=0),
            "tokenizer_config.json": {**_FAST, "add_eos_token": True, "eos_token": "</s>"},
        },
        "pieces_renamed": {
            "tokenizer.model": sentencepiece(),
            "tokenizer_config.json": {**_FAST, "added_tokens_decoder": renamed},
        },
        "pieces_unigram": {
            "tokenizer.model": sentencepiece(unigram, model_type=1),
            "tokenizer_config.json": _FAST,
        },
    }


def write(files: Files, directory: Path) -> Path:
    """Write a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, Tokenizer):
            content.save(str(directory / name))
        elif isinstance(content, bytes):
            (directory / name).write_bytes(content)
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            (directory / name).write_text(text, encoding="utf-8")
    return directory
