"""Finds the end tokens and the control tokens of a GGUF vocabulary.

An end token ends a text or a turn. Files often name only one end token, and some name the wrong
one: the metadata of early Llama 3 files say `<|end_of_text|>`, where a turn ends with `<|eot_id|>`.
llama.cpp therefore also recognizes tokens by their texts. The texts and exceptions here are those
of llama.cpp, found by running it on vocabularies with each of them.
"""

from collections.abc import Mapping, Sequence

from pdjax.formats.gguf_metadata import Metadata

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Values of `tokenizer.ggml.token_type`."""

_ENDS = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|calls|>",
        "<|flush|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<\uff5cend▁of▁sentence\uff5c>",
        "[e~[",
    ]
)
_FILL_IN_THE_MIDDLE_ENDS = {
    "fim_pad": ["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"],
    "fim_rep": ["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"],
    "fim_sep": ["<|file_sep|>"],
}
"""Texts of fill-in-the-middle tokens, by kind; used where the metadata do not name the token."""

_FILL_IN_THE_MIDDLE = frozenset(
    [
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<\uff5cfim▁begin\uff5c>",
        "<PRE>",
        "▁<PRE>",
        "<|code_prefix|>",
        "<|prefix|>",
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<\uff5cfim▁hole\uff5c>",
        "<SUF>",
        "▁<SUF>",
        "<|code_suffix|>",
        "<|suffix|>",
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<\uff5cfim▁end\uff5c>",
        "<MID>",
        "▁<MID>",
        "<|code_middle|>",
        "<|middle|>",
    ]
)
_SHOWN = frozenset(["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"])
"""Control tokens that a reader of their chat format needs in the text: they become user-defined."""

_KNOWN_TEXTS = _ENDS.union(_FILL_IN_THE_MIDDLE, _SHOWN, *_FILL_IN_THE_MIDDLE_ENDS.values())


def eos_token_ids(meta: Metadata) -> tuple[int, ...]:
    """Return the ids of the tokens that end a text or a turn, in order.

    Raises:
      ValueError: the metadata name an end token that the vocabulary does not have.
    """
    return tuple(sorted(_end_ids(meta, _known_texts(meta.strings("tokenizer.ggml.tokens")))))


def special_token_id(meta: Metadata, kind: str) -> int | None:
    """Return the id of the special token `kind`, such as "bos", or None.

    A SentencePiece file may leave out `<unk>`, `<s>` and `</s>`: their ids are 0, 1 and 2.

    Raises:
      ValueError: the vocabulary has no such id.
    """
    key = f"tokenizer.ggml.{kind}_token_id"
    known = meta.length("tokenizer.ggml.tokens")
    found = meta.get(key)
    if found is None:
        usual = {"unknown": 0, "bos": 1, "eos": 2}.get(kind)
        spm = meta.get("tokenizer.ggml.model") == "llama"
        return usual if spm and usual is not None and usual < known else None
    if type(found) is not int or found < 0 or (known and found >= known):
        raise meta.refuse(key, f"a token of the vocabulary, 0 to {known - 1}")
    return found


def token_types(meta: Metadata, tokens: Sequence[str]) -> list[int]:
    """Return the type of each token; the texts of known special tokens override the stored types.

    Raises:
      ValueError: the list of types is shorter than the vocabulary, or holds no integers.
    """
    key = "tokenizer.ggml.token_type"
    stored = meta.numbers(key)
    if stored is None:
        types = [NORMAL] * len(tokens)
    elif len(stored) < len(tokens) or stored.dtype.kind not in "iu":
        raise meta.refuse(key, f"an integer for each of the {len(tokens)} tokens")
    else:
        types = stored[: len(tokens)].tolist()
    vocab = _known_texts(tokens)
    ends = _end_ids(meta, vocab)
    for text in (_ENDS | _FILL_IN_THE_MIDDLE) & vocab.keys():
        types[vocab[text]] = CONTROL
    for texts in _FILL_IN_THE_MIDDLE_ENDS.values():
        for text in texts:
            if vocab.get(text) in ends:
                types[vocab[text]] = CONTROL
    shown = _SHOWN | ({"<|end|>"} if vocab.get("<|end|>") not in ends else set())
    for text in shown & vocab.keys():
        types[vocab[text]] = USER_DEFINED
    if "<|tool_response>" in vocab and "</s>" in vocab:
        types[vocab["</s>"]] = NORMAL
    return types


def _known_texts(tokens: Sequence[str]) -> dict[str, int]:
    """Return the ids of the tokens with known special texts."""
    return {text: i for i, text in enumerate(tokens) if text in _KNOWN_TEXTS}


def _end_ids(meta: Metadata, vocab: Mapping[str, int]) -> set[int]:
    named = {
        kind: special_token_id(meta, kind)
        for kind in ("eos", "eot", "eom", *_FILL_IN_THE_MIDDLE_ENDS)
    }
    for kind, texts in _FILL_IN_THE_MIDDLE_ENDS.items():
        if named[kind] is None:
            named[kind] = min((vocab[text] for text in texts if text in vocab), default=None)
    ids = {index for index in named.values() if index is not None}
    ids |= {vocab[text] for text in _ENDS & vocab.keys()}
    # In formats where a turn holds several messages, `<|end|>` ends a message and not the turn.
    several = ("<|return|>" in vocab and "<|call|>" in vocab) or (
        "<|flush|>" in vocab and ("<|call|>" in vocab or "<|calls|>" in vocab)
    )
    if several:
        ids.discard(vocab.get("<|end|>", -1))
    if "<|tool_response>" in vocab:
        ids.discard(vocab.get("</s>", -1))
    return ids
