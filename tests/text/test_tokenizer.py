"""Text to ids and back, chat templates, and text that arrives token by token."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from pdjax.text.detokenizer import Detokenizer
from pdjax.text.tokenizer import NoTokenizer, Tokenizer
from tests.helpers.tiny_gguf import write_gguf
from tests.helpers.tiny_tokenizer import BYTES, USER, write_directory

TEXTS = [
    "low lower lowest",
    "  12 apples,\n\n 345 pears\t",
    "naïve café: 日本語 😀👨‍👩‍👧",
    "don't\r\nI'LL",
    "",
]


def byte_level_metadata(pre: str = "smollm", **changes: Any) -> dict[str, Any]:
    """Make metadata of a vocabulary of all bytes, two merges, and two control tokens."""
    tokens = ["<|bos|>", "<|end|>", *BYTES, "lo", "low"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": ["l o", "lo w"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    } | changes


def from_gguf(tmp_path: Path, metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.open(write_gguf(tmp_path / "t.gguf", metadata=metadata))


@pytest.fixture
def byte_level(tmp_path: Path) -> Tokenizer:
    return from_gguf(tmp_path, byte_level_metadata())


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_round_trip(pre: str, tmp_path: Path):
    tokenizer = from_gguf(tmp_path, byte_level_metadata(pre))
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
    low = tokenizer.vocab_size - 1
    assert tokenizer.encode("low", add_special_tokens=False) == [low]
    assert tokenizer.eos_token_ids == (1,)


def test_control_tokens(byte_level: Tokenizer):
    ids = byte_level.encode("<|bos|>low<|end|>")
    assert ids == [0, byte_level.vocab_size - 1, 1]
    assert byte_level.decode(ids) == "low"
    assert byte_level.decode(ids, skip_special_tokens=False) == "<|bos|>low<|end|>"
    assert byte_level.special_token_ids == {0, 1}


def test_tokens_around_a_text(tmp_path: Path):
    both = byte_level_metadata() | {
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
    }
    tokenizer = from_gguf(tmp_path, both)
    assert tokenizer.encode("low") == [0, tokenizer.vocab_size - 1, 1]
    assert tokenizer.encode("low", add_special_tokens=False) == [tokenizer.vocab_size - 1]
    assert from_gguf(tmp_path, byte_level_metadata("llama-bpe")).encode("low")[0] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.pre": "klingon"}, r"tokenizer\.ggml\.pre='klingon'; allowed: .*smollm"),
        ({"tokenizer.ggml.model": "bert"}, r"tokenizer\.ggml\.model='bert'; allowed: 'gpt2'"),
        ({"tokenizer.ggml.tokens": None}, "no vocabulary"),
        ({"tokenizer.ggml.model": "llama"}, r"tokenizer\.ggml\.scores"),
        ({"tokenizer.ggml.merges": ["l o", "low"]}, r"^tokenizer\.ggml\.merges: 'low'; allowed"),
        ({"tokenizer.ggml.merges": ["l ow"]}, r"^tokenizer\.ggml\.merges: 'l ow'; allowed"),
        ({"tokenizer.ggml.merges": [7]}, r"^tokenizer\.ggml\.merges: 7; allowed"),
        ({"tokenizer.ggml.merges": "l o"}, r"^tokenizer\.ggml\.merges='l o'; allowed: a list"),
        ({"tokenizer.chat_template": 3}, r"tokenizer\.chat_template=3; allowed: a string"),
    ],
)
def test_unknown_tokenizers(changes: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        from_gguf(tmp_path, byte_level_metadata() | changes)


SPM_PIECES = {
    **{letter: -20.0 - i for i, letter in enumerate("▁abcd")},
    "ab": -1.5,
    "cd": -2.0,
    "bc": -1.0,
    "▁a": -3.0,
    "abcd": -4.0,
    "bcd": -5.0,
    "▁abcd": -6.0,
}


def spm_metadata() -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *SPM_PIECES]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + list(SPM_PIECES.values()),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(SPM_PIECES),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def spm_pieces(text: str) -> list[str]:
    """Cut by the definition of SentencePiece BPE: join the neighbours with the best-scoring union,
    leftmost first, until no union is a piece.
    """
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [a + b for a, b in itertools.pairwise(pieces)]
        known = [(-SPM_PIECES[piece], i) for i, piece in enumerate(joined) if piece in SPM_PIECES]
        if not known:
            return pieces
        _, i = min(known)
        pieces[i : i + 2] = [joined[i]]


def test_sentencepiece(tmp_path: Path):
    tokenizer = from_gguf(tmp_path, spm_metadata())
    tokens = spm_metadata()["tokenizer.ggml.tokens"]
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices("abcd ", k=rng.randrange(1, 14)))
        ids = tokenizer.encode(text)
        assert [tokens[i] for i in ids] == ["<s>", *spm_pieces(text)], text
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode("a😀é b")) == "a😀é b"  # through bytes


def test_incremental_text_is_the_whole_text(byte_level: Tokenizer, tmp_path: Path):
    spm = from_gguf(tmp_path, spm_metadata())
    for tokenizer, text in [(byte_level, text) for text in TEXTS] + [(spm, "ab 😀é  cd")]:
        decoder = tokenizer.incremental_decoder()
        shown = ""
        for token in tokenizer.encode(text):
            shown += decoder.push(token)
            assert text.startswith(shown)
        assert decoder.flush() == ""
        assert shown == text


def test_text_after_a_prompt_keeps_its_leading_space(byte_level: Tokenizer, tmp_path: Path):
    """SentencePiece drops the space before a text's first word; a completion keeps it."""
    spm = from_gguf(tmp_path, spm_metadata())
    for tokenizer in (byte_level, spm):
        whole = tokenizer.encode("ab cd ab")
        for cut in range(2, len(whole)):
            decoder = tokenizer.incremental_decoder(after=whole[:cut])
            text = "".join(map(decoder.push, whole[cut:])) + decoder.flush()
            assert tokenizer.decode(whole[:cut]) + text == "ab cd ab"
    half = byte_level.encode("é")[:1]
    assert byte_level.incremental_decoder(after=half).push(half[0]) == ""


def test_random_bytes(byte_level: Tokenizer):
    """The streamed text equals the text decoded at once, even for bytes that are no UTF-8."""
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.randrange(byte_level.vocab_size) for _ in range(rng.randrange(1, 12))]
        decoder = byte_level.incremental_decoder()
        shown = "".join([decoder.push(token) for token in ids]) + decoder.flush()
        assert shown == byte_level.decode(ids)


def test_half_a_character_waits(byte_level: Tokenizer):
    decoder = byte_level.incremental_decoder()
    first, *rest = byte_level.encode("é")
    assert decoder.push(first) == ""
    assert [decoder.push(token) for token in rest] == ["é"]
    assert decoder.push(first) == ""
    assert decoder.flush() == "\ufffd"


def test_the_window_stays_short(
    byte_level: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A stream of half characters, or of empty tokens, costs as much at its end as at its start."""
    sizes = []
    join = Detokenizer.join

    def measured(self: Detokenizer, tokens: list[str]) -> str:
        sizes.append(len(tokens))
        return join(self, tokens)

    monkeypatch.setattr(Detokenizer, "join", measured)
    for tokenizer in (byte_level, from_gguf(tmp_path, spm_metadata())):
        first, last = tokenizer.encode("é", add_special_tokens=False)[-2:]
        for token in (first, last, tokenizer.vocab_size + 5):
            decoder = tokenizer.incremental_decoder()
            for _ in range(500):
                decoder.push(token)
    assert len(sizes) > 500
    assert max(sizes) < 5


def test_control_tokens_show_only_if_asked(byte_level: Tokenizer):
    hidden, shown = (byte_level.incremental_decoder(skip) for skip in (True, False))
    low = byte_level.vocab_size - 1
    assert [hidden.push(token) for token in (low, 1, low)] == ["low", "", "low"]
    assert [shown.push(token) for token in (low, 1, low)] == ["low", "<|end|>", "low"]


def test_hugging_face_directory(tmp_path: Path):
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    config = {"bos_token": {"content": "<s>"}, "chat_template": template}
    tokenizer = Tokenizer.open(write_directory(tmp_path, config))
    assert tokenizer.render_chat(USER) == "<s>user:hi;"
    ids = tokenizer.apply_chat_template(USER)
    assert ids[0] == 256
    assert tokenizer.decode(ids) == "user:hi;"  # neither truncated nor padded to 3


def test_unreadable_directories(tmp_path: Path):
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a readable tokenizer"):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"chat_template": ["x"]}, "chat_template=.*must have a name and a template"),
        ({"chat_template": [{"name": "default"}]}, "chat_template=.*must have a name and a"),
        ({"chat_template": 3}, "chat_template=3: must be a string, or a list of named ones"),
        ({"bos_token": 3}, "bos_token=3: must be a string"),
        ({"extra_special_tokens": 1.5}, "extra_special_tokens=1.5: must be a list of tokens"),
        ({"additional_special_tokens": "x"}, "extra_special_tokens='x': must be a list"),
        ({"added_tokens_decoder": []}, r"added_tokens_decoder=\[\]: must be an object"),
        ({"added_tokens_decoder": {"1": "a"}}, "added_tokens_decoder: 'a': must be an object"),
        ({"pad_token": {"content": "a", "lstrip": 1}}, "pad_token: lstrip=1; allowed: true or"),
        ({"legacy": "yes"}, "legacy='yes': must be true or false"),
        ({"tokenizer_class": 3}, "tokenizer_class=3: must be a string"),
    ],
)
def test_malformed_companions(config: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {message}"):
        Tokenizer.open(write_directory(tmp_path, config))


def test_extra_tokens_of_two_files_must_both_be_lists(tmp_path: Path):
    directory = write_directory(tmp_path, {"extra_special_tokens": 1.5})
    (directory / "special_tokens_map.json").write_text('{"extra_special_tokens": ["a"]}')
    with pytest.raises(ValueError, match=r"extra_special_tokens=.*: must be a list of tokens"):
        Tokenizer.open(directory)


@pytest.mark.parametrize("ids", ["x", [1, "2"], -1, True, {}])
def test_malformed_end_tokens(ids: Any, tmp_path: Path):
    directory = write_directory(tmp_path, {})
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(
        ValueError, match=r"generation_config\.json: eos_token_id=.*must be a token"
    ):
        Tokenizer.open(directory)


@pytest.mark.parametrize("ids", [[-1], [1 << 40], ["a"], [None]])
def test_ids_that_are_none(ids: list[Any], byte_level: Tokenizer):
    with pytest.raises(ValueError, match=r"^token ids: they can't be decoded"):
        byte_level.decode(ids)


def test_a_prompt_must_be_text(byte_level: Tokenizer):
    with pytest.raises(ValueError, match=r"^prompt: '.ud800' at 1 is half a character"):
        byte_level.encode("a\ud800")
    with pytest.raises(ValueError, match="prompt=None: must be a string"):
        byte_level.encode(None)  # type: ignore[arg-type]


def test_a_token_without_an_id_is_refused_by_file(tmp_path: Path):
    directory = write_directory(tmp_path, {"added_tokens_decoder": {"x": {"content": "a"}}})
    with pytest.raises(
        ValueError, match=r"tokenizer_config\.json: added_tokens_decoder: 'x' is no"
    ):
        Tokenizer.open(directory)


def test_a_directory_without_a_vocabulary_is_told_from_a_broken_one(tmp_path: Path):
    assert Tokenizer.open_if_any(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    (tmp_path / "vocab.json").write_text("{}")  # no known class takes it
    assert Tokenizer.open_if_any(tmp_path) is None
    with pytest.raises(
        NoTokenizer, match=r"tokenizer\.json is missing, and vocab\.json is not read"
    ):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a readable tokenizer") as caught:
        Tokenizer.open_if_any(tmp_path)
    assert not isinstance(caught.value, NoTokenizer)


def test_a_panic_of_the_tokenizers_package_is_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class PanicException(BaseException):
        """The exception that the package raises where its Rust code panics."""

    def panic(*_: object) -> str:
        raise PanicException("index out of\nbounds")

    monkeypatch.setattr(Detokenizer, "join", panic)
    with pytest.raises(ValueError, match=r"tokenizer\.json: decoder \(index out of bounds\)"):
        Tokenizer.open(write_directory(tmp_path, {}))
