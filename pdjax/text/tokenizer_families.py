"""Tokenizer classes that fix their rules, whatever the files say.

For such a class transformers 5 takes only the vocabulary, the merges and the post-processor of
`tokenizer.json` and builds the rest by the class. Other classes use the file as it is.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pdjax.formats.sentencepiece_model import (
    BPE,
    CONTROL,
    NORMAL,
    UNIGRAM,
    USER_DEFINED,
    SentencePieceModel,
)

LLAMA, CODE_LLAMA = "LlamaTokenizer", "CodeLlamaTokenizer"
SENTENCEPIECE = (LLAMA, CODE_LLAMA)
"""Classes that may take their vocabulary from a SentencePiece model."""

_REGISTERED = {
    "qwen2": "Qwen2Tokenizer",
    "qwen2_moe": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
    "mistral": "TokenizersBackend",
    "ministral": "TokenizersBackend",
    "ministral3": "TokenizersBackend",
    "mixtral": "TokenizersBackend",
    "granite": "TokenizersBackend",
    "phi3": "TokenizersBackend",
    "internlm2": "TokenizersBackend",
    "internlm3": "TokenizersBackend",
    "olmo2": "TokenizersBackend",
}
"""Tokenizer classes by model type; a file may name another class."""

_MISNAMED = ("qwen2", "phi3", "internlm2", "internlm3")
"""Model types for which files name a wrong class."""

_WORDS = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"""
    r"""\s*[\r\n]+|\s+(?!\S)|\s+"""
)
_WORDS_WITH_MARKS = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"""
    r""" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


class Rules(NamedTuple):
    """The rules in `tokenizer_config.json`.

    Attributes:
      add_prefix_space: whether a space goes before a text; None leaves it to the class.
      legacy: whether a space also goes behind each control token.
      legacy_given: whether the file has `legacy`.
      unknown: text of the token for unknown text.
    """

    add_prefix_space: bool | None
    legacy: bool | None
    legacy_given: bool
    unknown: str


class Family(NamedTuple):
    """A class of tokenizers.

    Attributes:
      defaults: named control tokens that a file need not name.
      named_again: whether all control tokens are added once more, as special tokens.
      begins: whether a text begins with the BOS, whatever the post-processor does, unless a file
        says otherwise.
    """

    defaults: dict[str, str]
    named_again: bool = False
    begins: bool = False


_ENDOFTEXT = dict.fromkeys(("unk_token", "eos_token"), "<|endoftext|>")
_LLAMA_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}

FAMILIES: dict[str, Family] = {
    LLAMA: Family(_LLAMA_TOKENS),
    CODE_LLAMA: Family(
        {
            **_LLAMA_TOKENS,
            "prefix_token": "▁<PRE>",
            "middle_token": "▁<MID>",
            "suffix_token": "▁<SUF>",
            "eot_token": "▁<EOT>",
            "fill_token": "<FILL_ME>",
        },
        begins=True,
    ),
    "Qwen2Tokenizer": Family({**_ENDOFTEXT, "pad_token": "<|endoftext|>"}, named_again=True),
    "Qwen3_5Tokenizer": Family({**_ENDOFTEXT, "pad_token": "<|endoftext|>"}),
    "GPT2Tokenizer": Family({**_ENDOFTEXT, "bos_token": "<|endoftext|>"}),
    "GPTNeoXTokenizer": Family(
        {**_ENDOFTEXT, "bos_token": "<|endoftext|>", "pad_token": "<|padding|>"}
    ),
}


def choose_family(
    model_type: str | None, named: str | None, named_by_model: str | None, byte_level: bool
) -> str | None:
    """Choose the class that sets the rules; None takes the rules of `tokenizer.json`.

    Args:
      model_type: model type in `config.json`.
      named, named_by_model: classes that `tokenizer_config.json` and `config.json` name.
      byte_level: whether `tokenizer.json` has a byte-level step.
    """
    registered = _REGISTERED.get(model_type or "")
    in_files = _bare(named or named_by_model)
    if in_files == LLAMA and model_type not in _MISNAMED and byte_level:
        return None
    if in_files is not None and registered is not None and in_files != registered:
        if registered == "TokenizersBackend":
            return None
        in_files = registered if model_type in _MISNAMED else in_files
    chosen = in_files or registered
    return chosen if chosen in FAMILIES else None


def _bare(name: str | None) -> str | None:
    return name.removesuffix("Fast") if name else None


def build_family(
    family: str, vocab: dict[str, int], merges: Sequence[tuple[str, str]], rules: Rules
) -> Tokenizer:
    """Build a tokenizer with the rules of a class."""
    if family in SENTENCEPIECE:
        return _llama(family, vocab, merges, rules)
    prefix = bool(rules.add_prefix_space)
    tokenizer = Tokenizer(
        models.BPE(
            vocab, list(merges), continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False
        )
    )
    if family != "GPT2Tokenizer":
        tokenizer.normalizer = normalizers.NFC()
    if family in ("GPT2Tokenizer", "GPTNeoXTokenizer"):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    else:
        words = _WORDS if family == "Qwen2Tokenizer" else _WORDS_WITH_MARKS
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _llama(
    family: str, vocab: dict[str, int], merges: Sequence[tuple[str, str]], rules: Rules
) -> Tokenizer:
    prefix, code = rules.add_prefix_space is not False, family == CODE_LLAMA
    unknown = rules.unknown if code else None
    tokenizer = Tokenizer(
        models.BPE(vocab, list(merges), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    scheme = ("always" if rules.legacy and not code else "first") if prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix or code:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def read_family(family: str, content: Mapping[str, Any], rules: Rules) -> Tokenizer:
    """Build a tokenizer with the rules of a class and the vocabulary of a `tokenizer.json`.

    Raises:
      ValueError: `content` has no vocabulary with ids, or malformed merges.
    """
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):
        vocab = {entry[0] if isinstance(entry, list) else entry: i for i, entry in enumerate(vocab)}
    if not isinstance(model, dict) or not isinstance(vocab, dict):
        raise ValueError("model.vocab: must be an object of token ids")
    merges = [
        merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or []
    ]
    if not all(len(merge) == 2 for merge in merges):
        raise ValueError("model.merges: must be pairs of tokens")
    return build_family(family, vocab, [(left, right) for left, right in merges], rules)


def llama_from_sentencepiece(family: str, model: SentencePieceModel, rules: Rules) -> Tokenizer:
    """Build a tokenizer with the rules of a class from a SentencePiece model.

    The merges are ordered by the token id of their result.
    """
    vocab = {piece.text: index for index, piece in enumerate(model.pieces)}
    ranked = sorted(
        (index, len(left), left, right)
        for text, index in vocab.items()
        for left, right in _halves(text)
        if left in vocab and right in vocab
    )
    return _llama(family, vocab, [(left, right) for *_, left, right in ranked], rules)


def from_sentencepiece(
    model: SentencePieceModel, names: Mapping[int, str], rules: Rules
) -> Tokenizer:
    """Build a tokenizer that cuts a text as SentencePiece does.

    Args:
      names: texts, by id, for tokens that have another text in the SentencePiece vocabulary.

    Raises:
      ValueError: the model is neither BPE nor unigram.
    """
    kinds = {place: piece.kind for place, piece in enumerate(model.pieces)}
    text_of = {place: piece.text for place, piece in enumerate(model.pieces)}
    if model.model_type == UNIGRAM:
        unigram = [(piece.text, piece.score) for piece in model.pieces]
        tokenizer = Tokenizer(
            models.Unigram(unigram, unk_id=model.unk_id, byte_fallback=model.byte_fallback)
        )
    elif model.model_type == BPE:
        kept = {text for place, text in text_of.items() if place not in names}
        for place, name in names.items():
            if place in text_of and name not in kept:
                text_of[place] = name
        tokenizer = Tokenizer(_scored_bpe(model, text_of, kinds))
    else:
        raise ValueError(f"model_type={model.model_type}; allowed: {UNIGRAM} and {BPE}")
    whole = [text_of[place] for place, kind in kinds.items() if kind == USER_DEFINED]
    legacy = rules.legacy if rules.legacy_given else True
    _prepare_as_sentencepiece(tokenizer, model, whole, bool(legacy))
    return tokenizer


def _scored_bpe(
    model: SentencePieceModel, text_of: Mapping[int, str], kinds: Mapping[int, int]
) -> models.BPE:
    """Build a BPE model that joins the pair with the best score; only normal pieces are joined."""
    vocab = {text: place for place, text in text_of.items()}
    normal = {
        text_of[place]: (model.pieces[place].score, place)
        for place, kind in kinds.items()
        if kind == NORMAL
    }
    ranked = sorted(
        (-score, place, left, right)
        for text, (score, place) in normal.items()
        for left, right in _halves(text)
        if left in normal and right in normal
    )
    return models.BPE(
        vocab,
        [(left, right) for *_, left, right in ranked],
        unk_token=model.unk_piece,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        ignore_merges=USER_DEFINED in kinds.values(),
    )


def _prepare_as_sentencepiece(
    tokenizer: Tokenizer, model: SentencePieceModel, whole: Sequence[str], legacy: bool
) -> None:
    """Set how a text is prepared before it is cut, and how tokens are decoded."""
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if model.escape_whitespaces:
        steps.append(normalizers.Replace(" ", "▁"))
    if model.add_dummy_prefix and legacy:
        # A text that already begins with a space also gets the dummy prefix.
        steps.append(normalizers.Replace(Regex(r"\A▁"), "▁▁"))
    tokenizer.normalizer = normalizers.Sequence(steps)
    cuts: list[Any] = []
    if model.add_dummy_prefix:
        scheme = "always" if legacy else "first"
        cuts.append(pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False))
    if whole:
        pattern = "|".join(map(re.escape, sorted(whole, key=len, reverse=True)))
        cuts.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    if cuts:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    parts: list[Any] = [decoders.Replace("▁", " ")]
    if model.byte_fallback:
        parts.append(decoders.ByteFallback())
    if model.add_dummy_prefix or model.byte_fallback:
        parts.append(decoders.Fuse())
    if model.add_dummy_prefix:
        parts.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(parts)


def names_of_pieces(model: SentencePieceModel) -> dict[str, str]:
    """Return the control tokens that the model itself names, texts by name."""
    named = {
        "bos_token": (model.bos_id, model.bos_piece or "<s>"),
        "eos_token": (model.eos_id, model.eos_piece or "</s>"),
        "unk_token": (model.unk_id, model.unk_piece or "<unk>"),
    }
    return {name: text for name, (index, text) in named.items() if index >= 0}


def marked_pieces(model: SentencePieceModel) -> list[AddedToken]:
    """Return the control pieces and the user-defined pieces, which are never cut."""
    return [
        AddedToken(piece.text, normalized=False, special=piece.kind == CONTROL)
        for piece in model.pieces
        if piece.kind in (CONTROL, USER_DEFINED)
    ]


def _halves(text: str) -> list[tuple[str, str]]:
    return [(text[:cut], text[cut:]) for cut in range(1, len(text))]
