"""The tokenizer inside a GGUF file: a vocabulary, merges or scores, and a chat template.

Two families exist among Llama-like models: byte-level BPE ("gpt2" in GGUF's words), whose
pretokenizer is named but not stored, and SentencePiece BPE ("llama"), whose merges are implied by
the scores of the pieces. Both become an ordinary `tokenizers.Tokenizer`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
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

_GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

_PRETOKENIZERS: dict[str, tuple[str, ...]] = {
    "default": (_GPT2,),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "smaug-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
}
"""Regular expressions that cut a text into words, one after the other, by GGUF's name of the
pretokenizer.
"""

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


def open_gguf(path: Path) -> GGUFReader:
    """Map a GGUF file.

    Raises:
      ValueError: it is missing, truncated, or no GGUF file.
    """
    if not path.is_file():
        raise ValueError(f"model={str(path)!r}: no such file")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError) as error:
        raise ValueError(
            f"model={str(path)!r}: not a readable GGUF file ({_one_line(error)})"
        ) from error


class Metadata:
    """Key-value metadata of a GGUF file, with its errors in words."""

    def __init__(self, path: Path, reader: GGUFReader) -> None:
        self._path = path
        self._fields = reader.fields

    def get(self, key: str) -> Any:
        """The value, or None."""
        field = self._fields.get(key)
        return None if field is None else field.contents()

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer; a list of equal ones (some writers store one a layer) counts as one."""
        value = self._value(key, default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if not isinstance(value, int):
            raise ValueError(f"model={str(self._path)!r}: {key}={value!r}; allowed: one integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A float."""
        value = self._value(key, default)
        if not isinstance(value, int | float):
            raise ValueError(f"model={str(self._path)!r}: {key}={value!r}; allowed: a number")
        return _shortest_float(float(value))

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise ValueError(f"model={str(self._path)!r}: {key}={value!r}; allowed: a string")
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"model={str(self._path)!r}: the GGUF metadata lacks {key}")
        return value


def eos_token_ids(meta: Metadata) -> tuple[int, ...]:
    """Tokens that end a text or a turn, in the order of their ids."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [meta.get(f"tokenizer.ggml.{key}") for key in keys]
    return tuple(sorted({int(i) for i in ids if i is not None}))


def special_token(meta: Metadata, kind: str) -> str | None:
    """Text of the token that plays `kind` ("bos", "eos"), or None."""
    index = meta.get(f"tokenizer.ggml.{kind}_token_id")
    tokens = meta.get("tokenizer.ggml.tokens") or []
    return tokens[index] if index is not None and 0 <= index < len(tokens) else None


def build_tokenizer(meta: Metadata) -> Tokenizer:
    """The tokenizer that the metadata describes.

    Raises:
      ValueError: naming the tokenizer model or pretokenizer that is not supported, and those that
        are; or a merge that the vocabulary does not know.
    """
    tokens = meta.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ValueError("tokenizer.ggml.tokens: the GGUF metadata holds no vocabulary")
    model = meta.text("tokenizer.ggml.model")
    if model == "gpt2":
        tokenizer = _byte_level(meta, tokens)
    elif model == "llama":
        tokenizer = _sentencepiece(meta, tokens)
    else:
        raise ValueError(f"tokenizer.ggml.model={model!r}; allowed: 'gpt2', 'llama'")
    kinds = meta.get("tokenizer.ggml.token_type") or []
    control = [text for text, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL]
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in control]
    )
    user = [text for text, kind in zip(tokens, kinds, strict=False) if kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in user])
    _add_begin_and_end(meta, tokenizer, tokens, default_bos=model == "llama")
    return tokenizer


def _byte_level(meta: Metadata, tokens: Sequence[str]) -> Tokenizer:
    name = meta.text("tokenizer.ggml.pre", "default")
    if name not in _PRETOKENIZERS:
        raise ValueError(
            f"tokenizer.ggml.pre={name!r}; allowed: {', '.join(sorted(_PRETOKENIZERS))}"
        )
    vocab = {text: i for i, text in enumerate(tokens)}
    merges = _merges(meta, vocab)
    # Llama 3's vocabulary holds whole words that its merges cannot reach.
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=name == "llama-bpe"))
    if name in ("qwen2", "deepseek-r1-qwen"):
        tokenizer.normalizer = normalizers.NFC()
    splits: list[Any] = [
        pre_tokenizers.Split(Regex(p), behavior="isolated") for p in _PRETOKENIZERS[name]
    ]
    splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merges(meta: Metadata, vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges = meta.get("tokenizer.ggml.merges") or []
    if not isinstance(merges, list):
        raise ValueError(f"tokenizer.ggml.merges={merges!r}; allowed: a list of strings")
    pairs = []
    for merge in merges:
        left, space, right = str(merge).partition(" ")
        if not space or not {left, right, left + right} <= vocab.keys():
            raise ValueError(
                f"tokenizer.ggml.merges: {merge!r}; allowed: two tokens of the vocabulary, a space "
                "between them, whose union is a token, too"
            )
        pairs.append((left, right))
    return pairs


def _sentencepiece(meta: Metadata, tokens: Sequence[str]) -> Tokenizer:
    scores = meta.get("tokenizer.ggml.scores")
    if not scores:
        raise ValueError(
            "tokenizer.ggml.scores: a 'llama' tokenizer needs the scores of its pieces"
        )
    vocab = {text: i for i, text in enumerate(tokens)}
    unknown = special_token(meta, "unknown")
    merges = _merges_from_scores(vocab, scores)
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = meta.get("tokenizer.ggml.add_space_prefix")
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix is not False else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix is not False:
        parts.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def _merges_from_scores(vocab: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union scores best, so every split of a piece is a
    merge of its score.
    """
    ranked = []
    for piece, index in vocab.items():
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        known = [(a, b) for a, b in halves if a in vocab and b in vocab]
        ranked += [(-scores[index], index, vocab[a], vocab[b], a, b) for a, b in known]
    return [(a, b) for *_, a, b in sorted(ranked)]


def _add_begin_and_end(
    meta: Metadata, tokenizer: Tokenizer, tokens: Sequence[str], default_bos: bool
) -> None:
    if meta.get("tokenizer.ggml.pre") == "llama-bpe":
        default_bos = True
    template, special = "$A", []
    for kind, default in (("bos", default_bos), ("eos", False)):
        wanted = meta.get(f"tokenizer.ggml.add_{kind}_token")
        text = special_token(meta, kind)
        if text is not None and (default if wanted is None else wanted):
            template = f"{text} {template}" if kind == "bos" else f"{template} {text}"
            special.append((text, tokens.index(text)))
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=special
        )


def _shortest_float(value: float) -> float:
    """GGUF stores float32: 1e-5 comes back as 9.99999974e-06. The shortest decimal with the same
    float32 was meant.
    """
    return float(str(np.float32(value)))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
