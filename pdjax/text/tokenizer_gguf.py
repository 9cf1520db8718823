"""Reads the tokenizer of a GGUF file: a vocabulary, merges or scores, and chat templates.

Llama-like models use two families. For byte-level BPE ("gpt2" in GGUF's words) the file names the
pretokenizer but does not store it. For SentencePiece BPE ("llama") the scores of the pieces imply
the merges. Both become an ordinary `tokenizers.Tokenizer`.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
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

from pdjax.core.messages import one_line
from pdjax.formats.gguf_metadata import Metadata
from pdjax.text.gguf_end_tokens import (
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    special_token_id,
    token_types,
)
from pdjax.text.gguf_pretokenizers import DEFAULT, PRETOKENIZERS, Pretokenizer

_LOG = logging.getLogger("pdjax")

MODELS = ("gpt2", "llama")
MAX_CHARACTERS = 4096
"""Most characters of a token; the longest tokens in use are 512 spaces."""

MAX_MERGES = 1 << 21
"""Most merges; the largest vocabularies in use make a quarter of it."""

_FURTHER_NAMES = {
    "unk_token": "unknown",
    "pad_token": "padding",
    "sep_token": "seperator",  # as GGUF spells it
    "cls_token": "cls",
    "mask_token": "mask",
}
"""Kinds of tokens in the metadata by the names that chat templates use, without BOS and EOS."""

_TOKENS, _MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"


def special_token(meta: Metadata, kind: str) -> str | None:
    """Return the text of the special token `kind` ("bos", "eos"), or None.

    Raises:
      ValueError: the vocabulary has no token of the id in the metadata.
    """
    index = special_token_id(meta, kind)
    tokens = meta.strings(_TOKENS)
    return tokens[index] if index is not None and index < len(tokens) else None


def named_tokens(meta: Metadata) -> dict[str, str]:
    """Return the texts of the tokens that the metadata name, by the names that chat templates use.

    Some files name ids outside the vocabulary for padding and the like. They are skipped here, as
    in llama.cpp.

    Raises:
      ValueError: the vocabulary lacks the token that begins or ends a text.
    """
    tokens = meta.strings(_TOKENS)
    found = {f"{kind}_token": special_token(meta, kind) for kind in ("bos", "eos")}
    for name, kind in _FURTHER_NAMES.items():
        index = meta.get(f"tokenizer.ggml.{kind}_token_id")
        if type(index) is int and 0 <= index < len(tokens) and tokens[index]:
            found[name] = tokens[index]
    return {name: text for name, text in found.items() if text is not None}


def chat_templates(meta: Metadata) -> str | dict[str, str] | None:
    """Return the chat template of the file, or several by name, or None.

    Raises:
      ValueError: a template is not a string; the message names its key.
    """
    key = "tokenizer.chat_template"
    named = {found.removeprefix(f"{key}."): meta.text(found) for found in meta.keys(f"{key}.")}
    default = meta.text(key, "")
    if not named:
        return default or None
    return {"default": default, **named} if default else named


def build_tokenizer(meta: Metadata) -> Tokenizer:
    """Build the tokenizer that the metadata describes.

    Logs a warning where the file does not name its pretokenizer: the default is a guess.

    Raises:
      ValueError: the tokenizer model or pretokenizer is not supported (the message lists those
        that are), or a key's list is malformed or does not fit the vocabulary.
    """
    tokens = _vocabulary(meta)
    model = meta.text("tokenizer.ggml.model")
    if model not in MODELS:
        raise meta.refuse("tokenizer.ggml.model", ", ".join(map(repr, MODELS)))
    begins = True
    if model == "gpt2":
        kind = _pretokenizer(meta)
        begins = kind.begins
        tokenizer = _byte_level(meta, tokens, kind)
    else:
        tokenizer = _sentencepiece(meta, tokens)
    types = token_types(meta, tokens)
    special = [text for text, kind in zip(tokens, types, strict=True) if kind in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in special]
    )
    user = [text for text, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in user])
    _add_begin_and_end(meta, tokenizer, begins)
    return tokenizer


def _vocabulary(meta: Metadata) -> list[str]:
    tokens = meta.strings(_TOKENS)
    if not tokens:
        raise ValueError(
            f"model={str(meta.path)!r}: {_TOKENS}: the GGUF metadata holds no vocabulary"
        )
    tokens = [text or f"[EMPTY_{index}]" for index, text in enumerate(tokens)]
    if len(set(tokens)) < len(tokens):
        first: dict[str, int] = {}
        for index, text in enumerate(tokens):
            if first.setdefault(text, index) < index:
                raise ValueError(
                    f"model={str(meta.path)!r}: {_TOKENS}: tokens {first[text]} and {index} are "
                    f"both {text[:80]!r}; allowed: each text once"
                )
    longest = max(tokens, key=len)
    if len(longest) > MAX_CHARACTERS:
        raise ValueError(
            f"model={str(meta.path)!r}: {_TOKENS}: {longest[:40]!r}... has {len(longest)} "
            f"characters; allowed: at most {MAX_CHARACTERS}"
        )
    return tokens


def _pretokenizer(meta: Metadata) -> Pretokenizer:
    name = meta.text("tokenizer.ggml.pre", "") or DEFAULT
    if name == DEFAULT:
        _LOG.warning(
            "model=%r: tokenizer.ggml.pre does not name the pretokenizer; words are cut by "
            "llama.cpp's default, and token ids may differ from those in training",
            str(meta.path),
        )
    if name not in PRETOKENIZERS:
        raise meta.refuse("tokenizer.ggml.pre", ", ".join(sorted(PRETOKENIZERS)))
    return PRETOKENIZERS[name]


def _byte_level(meta: Metadata, tokens: Sequence[str], kind: Pretokenizer) -> Tokenizer:
    vocab = {text: i for i, text in enumerate(tokens)}
    tokenizer = Tokenizer(_bpe(vocab, _merges(meta), kind.whole_words))
    if kind.composed:
        tokenizer.normalizer = normalizers.NFC()
    splits: list[Any] = [
        pre_tokenizers.Split(Regex(expression), behavior="isolated")
        for expression in kind.expressions
    ]
    splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merges(meta: Metadata) -> list[tuple[str, str]]:
    merges = meta.get(_MERGES)
    if merges is None:
        raise ValueError(f"{_MERGES}: none; a 'gpt2' tokenizer needs its merges")
    if not isinstance(merges, list):
        raise ValueError(f"{_MERGES}={str(merges)[:80]!r}; allowed: a list of strings")
    if merges and not isinstance(merges[0], str):
        raise _no_merge(merges[0])
    unique = dict.fromkeys(merges)  # the first of equal merges counts
    return [(left, right) for left, _, right in (merge.partition(" ") for merge in unique)]


def _bpe(vocab: dict[str, int], merges: list[tuple[str, str]], whole_words: bool) -> models.BPE:
    try:
        return models.BPE(vocab, merges, ignore_merges=whole_words)
    except Exception as error:  # the tokenizers package raises bare Exception
        # The error does not name the merge. Checking all merges beforehand would take longer.
        for left, right in merges:
            if not (left in vocab and right in vocab and left + right in vocab):
                raise _no_merge(f"{left} {right}" if right else left) from error
        raise ValueError(f"{_MERGES}: {one_line(error)}") from error


def _no_merge(merge: object) -> ValueError:
    return ValueError(
        f"{_MERGES}: {repr(merge)[:80]}; allowed: two tokens of the vocabulary, a space between "
        "them, whose union is a token, too"
    )


def _sentencepiece(meta: Metadata, tokens: Sequence[str]) -> Tokenizer:
    scores = meta.numbers("tokenizer.ggml.scores")
    if scores is None or len(scores) < len(tokens):
        found = "none" if scores is None else f"{len(scores)}"
        raise ValueError(
            f"model={str(meta.path)!r}: tokenizer.ggml.scores: a 'llama' tokenizer needs a score "
            f"for each of its {len(tokens)} pieces; found {found}"
        )
    if not np.all(np.isfinite(scores)):
        raise meta.refuse("tokenizer.ggml.scores", "finite numbers", "NaN or infinity")
    vocab = {text: i for i, text in enumerate(tokens)}
    unknown = special_token_id(meta, "unknown")
    merges = _merges_from_scores(meta, vocab, scores.tolist())
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = meta.flag("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        parts.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def _merges_from_scores(
    meta: Metadata, vocab: dict[str, int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Return the merges, best first.

    SentencePiece joins the neighbours with the best-scoring union, so each split of a piece into
    two pieces is a merge with the score of the whole piece.
    """
    ranked: list[tuple[float, int, int, int, str, str]] = []
    for piece, index in vocab.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[index], index, vocab[left], vocab[right], left, right))
        if len(ranked) > MAX_MERGES:
            raise ValueError(
                f"model={str(meta.path)!r}: {_TOKENS}: the pieces make more than {MAX_MERGES} "
                "merges; allowed: fewer pieces that are made of pieces"
            )
    return [(left, right) for *_, left, right in sorted(ranked)]


def _add_begin_and_end(meta: Metadata, tokenizer: Tokenizer, begins: bool) -> None:
    template, special = "$A", []
    for kind, default in (("bos", begins), ("eos", False)):
        key = f"tokenizer.ggml.add_{kind}_token"
        index = special_token_id(meta, kind)
        if not meta.flag(key, default and index is not None):
            continue
        if index is None:
            raise meta.refuse(key, f"false, as there is no tokenizer.ggml.{kind}_token_id")
        template = f"{kind} {template}" if kind == "bos" else f"{template} {kind}"
        special.append((kind, index))
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=special
        )
