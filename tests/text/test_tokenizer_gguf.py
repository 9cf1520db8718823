"""Tokenizers of GGUF files: end tokens, types of tokens, tokens around a text, and refusals."""

from pathlib import Path
from typing import Any

import pytest

from pdjax.device.checkpoints.gguf import GGUFCheckpoint
from pdjax.formats.gguf_file import GGUFFile
from pdjax.formats.gguf_metadata import Metadata
from pdjax.text.gguf_end_tokens import eos_token_ids
from pdjax.text.tokenizer import Tokenizer
from tests.helpers.gguf_bytes import encoded, write
from tests.helpers.tiny_gguf import write_gguf
from tests.text.test_tokenizer import byte_level_metadata, spm_metadata

LETTERS = ["a", "b", "ab"]


def opened(tmp_path: Path, metadata: dict[str, Any]) -> Tokenizer:
    fields = tuple(encoded(key, value) for key, value in metadata.items() if value is not None)
    return Tokenizer.open(write(tmp_path / "t.gguf", fields))


def ends(tmp_path: Path, *tokens: str, **ids: int) -> set[str]:
    """Return the texts of the end tokens in a vocabulary of `tokens`."""
    fields = [
        encoded("tokenizer.ggml.model", "gpt2"),
        encoded("tokenizer.ggml.tokens", [*LETTERS, *tokens]),
        *(encoded(f"tokenizer.ggml.{kind}_token_id", index) for kind, index in ids.items()),
    ]
    path = write(tmp_path / "t.gguf", tuple(fields))
    return {[*LETTERS, *tokens][i] for i in eos_token_ids(Metadata(path, GGUFFile(path)))}


ENDS = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|calls|> <|flush|> <end_of_turn> "
    "<|endoftext|> <|end_of_text|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <end_of_utterance> "
    "<eos> <turn|> <|tool_response> <\uff5cend\u2581of\u2581sentence\uff5c> [e~[ <|fim_pad|> "
    "<fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> "
    "<|file_sep|>"
)


@pytest.mark.parametrize("text", ENDS.split())
def test_a_text_that_ends_in_llama_cpp_ends(text: str, tmp_path: Path):
    assert ends(tmp_path, text, eos=0) == {"a", text}


@pytest.mark.parametrize(
    "text", ["<|user|>", "<unk>", "<eot>", "<|eot|>", "<|fim_prefix|>", "</S>"]
)
def test_other_texts_do_not_end(text: str, tmp_path: Path):
    assert ends(tmp_path, text, eos=0) == {"a"}


def test_ends_that_the_metadata_name(tmp_path: Path):
    assert ends(tmp_path, eos=0, eot=1, eom=2) == {"a", "b", "ab"}
    assert ends(tmp_path, fim_pad=0, fim_rep=1, fim_sep=2) == {"a", "b", "ab"}
    assert ends(tmp_path, "[PAD]", fim_pad=0) == {"a"}  # a named id overrides a text
    assert ends(tmp_path) == set()


def test_an_early_llama3_file_ends_its_turns(tmp_path: Path):
    found = ends(tmp_path, "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", eos=3)
    assert found == {"<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"}


def test_the_end_of_a_message_is_none_where_turns_have_several(tmp_path: Path):
    assert ends(tmp_path, "<|end|>", "<|return|>", "<|call|>") == {"<|return|>", "<|call|>"}
    assert ends(tmp_path, "<|end|>", "<|flush|>", "<|calls|>") == {"<|flush|>", "<|calls|>"}
    assert ends(tmp_path, "<|end|>", "<|call|>") == {"<|end|>", "<|call|>"}
    assert ends(tmp_path, "</s>", "<|tool_response>", eos=0) == {"a", "<|tool_response>"}


def test_sentencepiece_ends_with_its_usual_token(tmp_path: Path):
    metadata = spm_metadata() | {
        f"tokenizer.ggml.{kind}_token_id": None for kind in ("bos", "eos", "unknown")
    }
    tokenizer = opened(tmp_path, metadata)
    assert tokenizer.eos_token_ids == (2,)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.encode("ab")[0] == 1


def test_a_token_that_looks_like_control_is_one(tmp_path: Path):
    """Some files give their end-of-turn token the type of text."""
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.tokens"] += ["<|im_end|>", "<|channel|>"]
    metadata["tokenizer.ggml.token_type"] += [1, 3]
    tokenizer = opened(tmp_path, metadata)
    last = tokenizer.vocab_size - 1
    assert tokenizer.encode("<|im_end|>") == [last - 1]
    assert last - 1 in tokenizer.special_token_ids
    assert last - 1 in tokenizer.eos_token_ids
    assert tokenizer.decode([last - 1, last]) == "<|channel|>"  # a reader needs it


def test_an_empty_token_gets_a_text(tmp_path: Path):
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.tokens"] += ["", ""]
    metadata["tokenizer.ggml.token_type"] += [1, 1]
    tokenizer = opened(tmp_path, metadata)
    assert tokenizer.vocab_size == len(metadata["tokenizer.ggml.tokens"])


@pytest.mark.parametrize("pre", [None, "", "default"])
def test_a_pretokenizer_without_a_name_is_a_guess_that_is_said(
    pre: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    metadata = byte_level_metadata() | {"tokenizer.ggml.pre": pre}
    tokenizer = opened(tmp_path, metadata)
    assert caplog.text.count("tokenizer.ggml.pre does not name the pretokenizer") == 1
    assert tokenizer.decode(tokenizer.encode("lower 1234!?")) == "lower 1234!?"


def test_of_equal_merges_the_first_counts(tmp_path: Path):
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.tokens"] += ["ow"]
    metadata["tokenizer.ggml.token_type"] += [1]
    metadata["tokenizer.ggml.merges"] = ["l o", "o w", "lo w", "l o"]
    tokenizer = opened(tmp_path, metadata)
    assert tokenizer.encode("low") == [metadata["tokenizer.ggml.tokens"].index("low")]


def test_begin_and_end_may_have_any_text(tmp_path: Path):
    metadata = byte_level_metadata("llama-bpe", **{"tokenizer.ggml.add_eos_token": True})
    metadata["tokenizer.ggml.tokens"][:2] = ["$A : x", "end of it $0"]
    tokenizer = opened(tmp_path, metadata)
    assert tokenizer.encode("low") == [0, tokenizer.vocab_size - 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.merges": None}, "merges: none; a 'gpt2' tokenizer needs its merges"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "token_type=.*an integer for each of the 260"),
        ({"tokenizer.ggml.token_type": 3}, "token_type=3; allowed: a list of numbers"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "tokens 0 and 2 are both 'a'; allowed"),
        ({"tokenizer.ggml.tokens": [7]}, r"tokens=\[7\]; allowed: a list of strings"),
        ({"tokenizer.ggml.tokens": ["a", "x" * 5000]}, "has 5000 characters; allowed: at most"),
        ({"tokenizer.ggml.tokens": [b"\xff"]}, r"tokens\[0\]=b'.xff'; allowed: UTF-8"),
        ({"tokenizer.ggml.bos_token_id": 260}, "bos_token_id=260; allowed: a token of the voc"),
        ({"tokenizer.ggml.eos_token_id": -1}, "eos_token_id=-1; allowed: a token of the vocab"),
        ({"tokenizer.ggml.eot_token_id": 2.0}, "eot_token_id=2.0; allowed: a token of the voc"),
        (
            {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None},
            "add_bos_token=True; allowed: false, as there is no tokenizer.ggml.bos_token_id",
        ),
        ({"tokenizer.ggml.add_bos_token": 1}, "add_bos_token=1; allowed: true or false"),
    ],
)
def test_what_makes_no_tokenizer_is_named(changes: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message) as caught:
        opened(tmp_path, byte_level_metadata() | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (None, "needs a score for each of its 271 pieces; found none"),
        ([0.0, 1.0], "needs a score for each of its 271 pieces; found 2"),
        ([float("nan")] * 271, "scores='NaN or infinity'; allowed: finite numbers"),
    ],
)
def test_scores_that_make_no_tokenizer(scores: Any, message: str, tmp_path: Path):
    metadata = spm_metadata() | {"tokenizer.ggml.scores": scores}
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, metadata)


def test_the_checkpoint_stops_where_its_tokenizer_does(tmp_path: Path):
    metadata = byte_level_metadata()
    tokens = [*metadata["tokenizer.ggml.tokens"][:98], "<|im_end|>", "lo", "low"]
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * 101}
    del metadata["tokenizer.ggml.merges"]
    path = write_gguf(tmp_path / "m.gguf", metadata=metadata)
    assert GGUFCheckpoint(path).spec.eos_token_ids == (1, 98)


def test_templates_that_have_names(tmp_path: Path):
    """llama.cpp's converter writes the templates of a model that has several in this form."""
    key = "tokenizer.chat_template"
    several = {
        key: "plain",
        f"{key}.tool_use": "{{ tools | length }} tools",
        f"{key}.rag": "{{ documents | length }} documents",
        "tokenizer.chat_templates": ["tool_use", "rag"],
    }
    tokenizer = opened(tmp_path, byte_level_metadata() | several)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.render_chat(messages) == "plain"
    assert tokenizer.render_chat(messages, tools=[{"name": "f"}]) == "1 tools"
    found = tokenizer.render_chat(messages, documents=[{"text": "x"}], chat_template="rag")
    assert found == "1 documents"
    tokenizer.save(tmp_path)
    assert Tokenizer.open(tmp_path).chat_template == tokenizer.chat_template


def test_a_template_knows_the_tokens_that_the_metadata_name(tmp_path: Path):
    metadata = byte_level_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {"unknown": 5, "padding": len(tokens), "seperator": 6, "mask": 7}
    named = {f"tokenizer.ggml.{kind}_token_id": index for kind, index in ids.items()}
    tokenizer = opened(tmp_path, metadata | named)
    source = "{{ unk_token }}{{ sep_token }}{{ mask_token }}{{ pad_token is defined }}"
    shown = tokenizer.render_chat([{"role": "user", "content": "hi"}], chat_template=source)
    assert shown == "".join([*tokens[5:8], "False"])
