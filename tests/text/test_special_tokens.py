"""The control tokens of a Hugging Face directory, and how they are encoded and decoded; expected
values come from transformers 5.24."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as Backend

from pdjax.text.tokenizer import Tokenizer
from tests.helpers.tiny_gguf import write_gguf
from tests.helpers.tiny_tokenizer import BYTES, write_directory

END = 257  # the token behind the 256 bytes and <s>


def with_token(directory: Path, config: dict[str, Any], **flags: bool) -> Path:
    """Write a directory with `<|im_end|>` in its tokenizer.json."""
    write_directory(directory, config)
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    content["added_tokens"].append({"id": END, "content": "<|im_end|>", **off, **flags})
    path.write_text(json.dumps(content))
    return directory


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    decoder = tokenizer.incremental_decoder()
    return "".join(map(decoder.push, ids)) + decoder.flush()


def check_saved(tokenizer: Tokenizer, ids: list[int], directory: Path) -> None:
    directory.mkdir()
    tokenizer.save(directory)
    again = Tokenizer.open(directory)
    assert again.decode(ids) == tokenizer.decode(ids) == streamed(again, ids)
    assert again.special_token_ids == tokenizer.special_token_ids


@pytest.mark.parametrize("named", [{"eos_token": "<|im_end|>"}, {"pad_token": "<|im_end|>"}])
def test_a_token_that_a_file_names_is_a_control_token_whatever_its_flag(
    named: dict[str, Any], tmp_path: Path
):
    tokenizer = Tokenizer.open(with_token(tmp_path / "named", named))
    ids = tokenizer.encode("hi<|im_end|>")
    assert ids[-1] == END
    assert tokenizer.decode(ids) == streamed(tokenizer, ids) == "hi"
    check_saved(tokenizer, ids, tmp_path / "saved")
    other = Tokenizer.open(with_token(tmp_path / "unnamed", {}))
    assert other.decode(ids) == streamed(other, ids) == "hi<|im_end|>"


def test_a_control_token_stays_one_where_another_file_lists_it_without_the_flag(tmp_path: Path):
    config = {"added_tokens_decoder": {str(END): {"content": "<|im_end|>", "special": False}}}
    tokenizer = Tokenizer.open(with_token(tmp_path / "listed", config, special=True))
    ids = tokenizer.encode("hi<|im_end|>")
    assert tokenizer.decode(ids) == streamed(tokenizer, ids) == "hi"
    check_saved(tokenizer, ids, tmp_path / "saved")


def test_a_control_token_that_the_normalizer_changes_is_shown_by_stream_and_decode_alike(
    tmp_path: Path,
):
    directory = with_token(tmp_path / "changed", {}, special=True, normalized=True)
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    backend.normalizer = normalizers.Lowercase()
    backend.add_special_tokens([AddedToken("<|OTHER|>", normalized=True)])
    backend.save(str(directory / "tokenizer.json"))
    tokenizer = Tokenizer.open(directory)
    for ids in ([END], [END + 1], [72, END + 1, 72, END]):
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)


def test_a_saved_tokenizer_of_a_gguf_file_has_its_control_tokens_and_no_others(tmp_path: Path):
    """In llama.cpp the type alone makes a token a control token, whatever the metadata name it."""
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*BYTES, "ab", "<begin>", "<stop>", "<pad>"],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [1] * 258 + [1, 3],
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.ggml.add_bos_token": True,
    }
    tokenizer = Tokenizer.open(write_gguf(tmp_path / "a.gguf", metadata=metadata))
    assert tokenizer.special_token_ids == {259}
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.open(tmp_path / "saved")
    assert again.special_token_ids == {259}
    assert again.eos_token_ids == (258,)
    assert (again.bos_token, again.eos_token) == ("<begin>", "<stop>")
    for text in ("ab <stop> ab", "<begin><pad>", "é"):
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids
        assert again.decode(ids) == tokenizer.decode(ids) == streamed(again, ids)
