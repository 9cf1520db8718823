"""The pretokenizers of GGUF files: how byte-level BPE cuts a text into words before it merges.

A GGUF file names the pretokenizer and does not store it. The names, expressions and flags are those
of llama.cpp; `tests/parity` compares this table with its token ids. Two rules of the models' own
tokenizer.json are kept, which llama.cpp leaves out: Qwen's composition of characters (NFC), and
contractions that ignore case by the rules of Unicode.
"""

from dataclasses import dataclass

_GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SEED = _QWEN2.replace(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}\r\n]+")
_QWEN35 = _QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(
    r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"
)
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_BLOOM = r" ?[^(\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"

# llama.cpp tells upper from lower case in ASCII only: other letters match both runs of a word.
_UPPER, _LOWER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
_HEAD = r"[^\r\n\p{L}\p{N}]?"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_TEKKEN = f"{_HEAD}{_UPPER}*{_LOWER}+|{_HEAD}{_UPPER}+{_LOWER}*|" + r"\p{N}|" + _TAIL
_GPT4O = (
    f"{_HEAD}{_UPPER}*{_LOWER}+{_CONTRACTION}|{_HEAD}{_UPPER}+{_LOWER}*{_CONTRACTION}|"
    r"\p{N}{1,3}|" + _TAIL
)

# Letters of scripts that have two cases.
_CASED = (
    r"A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    r"\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    r"\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    r"\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    r"\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    r"\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    r"\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    r"\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b"
    r"\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    r"\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    r"\x{10400}-\x{1044f}\x{104b0}-\x{104d3}\x{104d8}-\x{104fb}\x{10c80}-\x{10cb2}"
    r"\x{10cc0}-\x{10cf2}\x{118a0}-\x{118df}\x{1e900}-\x{1e943}"
)
# In llama.cpp no range of characters matches a space, not even a range that ends at U+3000.
_MARKS = r"!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3001\u3002"
_ASIAN = r"[[\u0800-\u9fa5\uac00-\ud7ff]&&[^\s]]+"


@dataclass(frozen=True)
class Pretokenizer:
    """How texts are cut into words, and further rules that llama.cpp ties to the name.

    Attributes:
      expressions: regular expressions in Oniguruma's syntax; each cuts the pieces that the one
        before it left.
      whole_words: whether a word that is a token stays whole, whatever the merges would do.
      begins: whether a text begins with the BOS token unless the metadata say otherwise.
      composed: whether texts are first composed (NFC), as the tokenizer.json of these models says.
    """

    expressions: tuple[str, ...]
    whole_words: bool = False
    begins: bool = False
    composed: bool = False


DEFAULT = "default"
"""The name where a file has none: llama.cpp then guesses these expressions and warns of it."""

_KINDS: dict[str, Pretokenizer] = {
    DEFAULT: Pretokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2 mpt olmo jais phi-2 gigachat a.x-4.0 mellum exaone4 trillion granite-docling": (
        Pretokenizer((_GPT2,))
    ),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": (
        Pretokenizer((r"\p{N}", _GPT2))
    ),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": (
        Pretokenizer((_LLAMA3,), whole_words=True, begins=True)
    ),
    "smaug-bpe dbrx glm4 chatglm-bpe": Pretokenizer((_LLAMA3,)),
    "qwen2 deepseek-r1-qwen": Pretokenizer((_QWEN2,), composed=True),
    "megrez stablelm2 hunyuan kormo f2llmv2 solar-open grok-2": Pretokenizer((_QWEN2,)),
    "qwen35": Pretokenizer((_QWEN35,), composed=True),
    "seed-coder": Pretokenizer((_SEED,)),
    "bailingmoe bailingmoe2 llada-moe": Pretokenizer((_BAILING,)),
    "minicpm5": Pretokenizer((r"\p{N}{1,3}", _LLAMA3.replace("{1,3}", "+")), whole_words=True),
    "bloom poro-chat gpt3-finnish": Pretokenizer((_BLOOM,)),
    "viking": Pretokenizer((_BLOOM, r"\p{N}")),
    "tekken": Pretokenizer((_TEKKEN,), whole_words=True, begins=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": Pretokenizer((_GPT4O,)),
    "falcon": Pretokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "deepseek-llm": Pretokenizer(
        (r"[\r\n]", rf"\s?[{_CASED}]+", rf"\s?[{_MARKS}]+", r"\s+$", _ASIAN, r"\p{N}+")
    ),
    "deepseek-coder": Pretokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _ASIAN, r"\p{N}")),
    "deepseek-v3 hunyuan-dense joyai-llm": Pretokenizer(
        (
            r"\p{N}{1,3}",
            r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
            r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )
    ),
}

PRETOKENIZERS: dict[str, Pretokenizer] = {
    name: kind for names, kind in _KINDS.items() for name in names.split()
}
"""Pretokenizers by their names in `tokenizer.ggml.pre`, aliases included."""
