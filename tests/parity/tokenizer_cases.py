"""Small tokenizer directories with every way of naming tokens and rules; released models have the
same files."""

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    Regex,
    Tokenizer,
    normalizers,
    pre_tokenizers,
)

from tests.parity.tokenizer_parts import (
    BYTES,
    MERGES,
    PIECES,
    byte_fallback,
    byte_level,
    sentencepiece,
    token,
)

_SIZE = len(BYTES) + len(MERGES) + 2
LISTED = {
    str(_SIZE - 2): token("<s>", special=True),
    str(_SIZE - 1): token("</s>", special=True),
    str(_SIZE): token("<|im_end|>", special=True),
    str(_SIZE + 1): token("STRIPL", lstrip=True),
    str(_SIZE + 2): token("STRIPR", rstrip=True, special=True),
    str(_SIZE + 3): token("STRIPS", lstrip=True, rstrip=True),
    str(_SIZE + 4): token("word", single_word=True, normalized=True),
    str(_SIZE + 5): token("NORM", normalized=True),
    str(_SIZE + 6): token("tok1"),
}

Files = dict[str, Any]
"""Content by file name: a Tokenizer, bytes, text, or a value to write as JSON."""

_FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
_LLAMA = {"model_type": "llama"}
_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def directories() -> dict[str, Files]:
    """Make the files of all directories, by name."""
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
                    "900": token("tok2"),
                    "899": token("tok1", special=True),
                    "7": token("the"),
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
                "bos_token": token("<s>", lstrip=True),
                "eos_token": "<|im_end|>",
                "pad_token": token("<pad>", rstrip=True),
                "additional_special_tokens": ["<|im_start|>", "tok1"],
                "image_token": "<image>",
            },
        },
        "additional_in_both": {
            "tokenizer.json": byte_level(),
            "tokenizer_config.json": {"additional_special_tokens": ["<|im_end|>", "the"]},
            "special_tokens_map.json": {
                "additional_special_tokens": ["<|im_start|>"],
                "mask_token": token("<mask>", lstrip=True),
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
                "eos_token": {"__type": "AddedToken", **token("</s>", lstrip=True)},
                "added_tokens_decoder": {},
            },
        },
        "not_special_in_list": {
            "tokenizer.json": byte_level(),
            "tokenizer_config.json": {
                "eos_token": "<|im_end|>",
                "added_tokens_decoder": {str(_SIZE): token("<|im_end|>", normalized=True)},
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
    listed = {str(i): token(PIECES[i][0], special=True) for i in range(3)}
    more = {**listed, "900": token("<|im_end|>", special=True), "901": token("tok2")}
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
    renamed = {"264": token("tok2"), "277": token("TOOL", special=True), "300": token("tok3")}
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
                    "270": token("<|endoftext|>", special=True),
                    "271": token("<|im_start|>", special=True),
                    "272": token("<|im_end|>", special=True),
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
