"""Hugging Face directories: configurations read or refused, files missing or malformed."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import models

from pdjax.core.model_spec import RopeSpec
from pdjax.device.checkpoints.huggingface import HuggingFaceCheckpoint
from pdjax.device.checkpoints.open import open_checkpoint
from pdjax.device.models.registry import family_of
from tests.helpers import tiny_models

LISTED = {"9": {"content": "<eos>", "special": True}}


def change_config(directory: Path, changes: dict[str, Any]) -> Path:
    """Set fields of `config.json`."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def test_slices(tmp_path: Path):
    checkpoint = HuggingFaceCheckpoint(tiny_models.write("smollm2", tmp_path))
    for name, values in tiny_models.tensors("smollm2").items():
        np.testing.assert_array_equal(checkpoint.read(name), values)
        np.testing.assert_array_equal(checkpoint.read(name, slice(3, 17)), values[3:17])
        if values.ndim == 2:
            part = checkpoint.read(name, slice(3, 17), slice(5, 6))
            np.testing.assert_array_equal(part, values[3:17, 5:6])


def test_bfloat16_files_and_tensors_to_ignore(tmp_path: Path):
    directory = tiny_models.write("qwen2", tmp_path)
    found = {k: v.astype(ml_dtypes.bfloat16) for k, v in tiny_models.tensors("qwen2").items()}
    found["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    found["lm_head.weight"] = found["model.embed_tokens.weight"].copy()  # tied all the same
    save_file(found, directory / "model.safetensors")
    checkpoint = HuggingFaceCheckpoint(directory)
    assert checkpoint.spec.tied
    assert checkpoint.read("model.norm.weight").dtype == ml_dtypes.bfloat16


def test_both_ways_to_write_rope(tmp_path: Path):
    scaling = {"type": "linear", "factor": 2.0}
    old = change_config(
        tiny_models.write("llama", tmp_path / "old"),
        {"rope_theta": 5e5, "rope_scaling": scaling},
    )
    new = change_config(
        tiny_models.write("llama", tmp_path / "new"),
        {"rope_theta": None, "rope_parameters": {**scaling, "rope_theta": 5e5}},
    )
    expected = RopeSpec(theta=5e5, kind="linear", factor=2.0)
    assert HuggingFaceCheckpoint(old).spec.rope == expected
    assert HuggingFaceCheckpoint(new).spec.rope == expected


def test_end_tokens_come_from_the_generation_config(tmp_path: Path):
    directory = tiny_models.write("llama", tmp_path)
    assert HuggingFaceCheckpoint(directory).spec.eos_token_ids == (2,)
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert HuggingFaceCheckpoint(directory).spec.eos_token_ids == (2, 5)


def write_tokenizer(directory: Path, vocabulary: list[str], special: list[str]) -> None:
    """A tokenizer of whole words, some of them special tokens."""
    backend = Backend(models.WordLevel({text: i for i, text in enumerate(vocabulary)}, "?"))
    backend.add_special_tokens(special)
    backend.save(str(directory / "tokenizer.json"))


def test_end_tokens_come_from_every_file_that_names_one(tmp_path: Path):
    """Ids of two files, the text of the tokenizer's own, and a text that ends a turn."""
    directory = tiny_models.write("llama", tmp_path)
    write_tokenizer(directory, ["?", "a", "b", "c", "d"], ["<eos>", "<|eot_id|>"])
    (directory / "generation_config.json").write_text('{"eos_token_id": 4}')
    (directory / "tokenizer_config.json").write_text('{"eos_token": {"content": "<eos>"}}')
    checkpoint = open_checkpoint(directory)
    assert checkpoint.spec.eos_token_ids == (4, 2, 5, 6)
    tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    assert tokenizer.eos_token_ids == (4, 2, 5, 6)


def test_no_end_token_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    directory = change_config(tiny_models.write("llama", tmp_path), {"eos_token_id": None})
    write_tokenizer(directory, ["?", "a"], [])
    assert open_checkpoint(directory).spec.eos_token_ids == ()
    assert [("names no end token" in line) for line in caplog.messages] == [True]


def test_end_tokens_that_no_token_can_be_are_as_good_as_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    directory = change_config(tiny_models.write("llama", tmp_path), {"eos_token_id": 128009})
    assert open_checkpoint(directory).spec.eos_token_ids == (128009,)
    assert any("names no end token (eos_token_id) below vocab_size=" in m for m in caplog.messages)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"eos_token": "<eos>", "added_tokens_decoder": LISTED}},
        {"tokenizer_config.json": {"eos_token": "<eos>"}, "added_tokens.json": {"<eos>": 9}},
        {
            "special_tokens_map.json": {"eos_token": {"content": "<eos>"}},
            "vocab.json": {"<eos>": 9},
        },
        {"added_tokens.json": {"<|im_end|>": 9, "<|im_start|>": 8}},
    ],
)
def test_without_a_tokenizer_end_tokens_come_from_files_that_list_ids(
    files: dict[str, Any], tmp_path: Path
):
    directory = tiny_models.write("llama", tmp_path)
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    assert open_checkpoint(directory).spec.eos_token_ids == (2, 9)


def test_without_a_tokenizer_a_directory_serves_token_ids(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    directory = tiny_models.write("llama", tmp_path)
    checkpoint = open_checkpoint(directory)
    assert checkpoint.tokenizer() is None
    assert checkpoint.spec.eos_token_ids == (2,)
    assert caplog.messages == [
        f"{directory}: tokenizer.json is missing; prompts must be token ids, answers have no text"
    ]


def tied_with_head(directory: Path, head: np.ndarray, *, keep: bool = True) -> Path:
    """A tied model whose file holds the output matrix `head`; and, if `keep`, the embedding."""
    found = tiny_models.tensors("qwen2") | {"lm_head.weight": head}
    if not keep:
        del found["model.embed_tokens.weight"]
    directory = tiny_models.write("qwen2", directory)
    save_file(found, directory / "model.safetensors")
    return directory


def test_a_head_beside_a_tied_embedding_counts_if_it_differs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    embedding = tiny_models.tensors("qwen2")["model.embed_tokens.weight"]
    other = embedding.copy()
    other[-1, -1] += 1e-3
    checkpoint = HuggingFaceCheckpoint(tied_with_head(tmp_path, other))
    assert not checkpoint.spec.tied
    np.testing.assert_array_equal(checkpoint.read("lm_head.weight"), other)
    assert "lm_head.weight is not the embedding; lm_head.weight is used" in caplog.text


def test_a_head_that_is_the_embedding_is_tied(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    embedding = tiny_models.tensors("qwen2")["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16)
    for place, head in enumerate((embedding, embedding.astype(np.float32))):
        directory = tied_with_head(tmp_path / str(place), head)
        found = tiny_models.tensors("qwen2")
        found |= {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
        save_file(found, directory / "model.safetensors")
        assert HuggingFaceCheckpoint(directory).spec.tied
    assert "lm_head" not in caplog.text


def test_of_a_tied_pair_one_is_enough(tmp_path: Path):
    embedding = tiny_models.tensors("qwen2")["model.embed_tokens.weight"]
    checkpoint = HuggingFaceCheckpoint(tied_with_head(tmp_path, embedding, keep=False))
    assert checkpoint.spec.tied
    np.testing.assert_array_equal(checkpoint.read("model.embed_tokens.weight"), embedding)


def test_a_head_of_another_shape_is_refused(tmp_path: Path):
    embedding = tiny_models.tensors("qwen2")["model.embed_tokens.weight"]
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \(50, 64\); .*\(101, 64\)"):
        HuggingFaceCheckpoint(tied_with_head(tmp_path, embedding[:50].copy()))


def test_absent_fields_are_those_of_transformers(tmp_path: Path):
    contexts = {"llama": 2048, "qwen2": 32768}
    for name, context in contexts.items():
        directory = tiny_models.write(name, tmp_path / name)
        config = json.loads((directory / "config.json").read_text())
        del config["max_position_embeddings"], config["hidden_act"], config["rms_norm_eps"]
        (directory / "config.json").write_text(json.dumps(config))
        spec = HuggingFaceCheckpoint(directory).spec
        assert (spec.context, spec.norm_eps) == (context, 1e-6)


def test_a_window_that_llama_does_not_use(tmp_path: Path):
    directory = change_config(tiny_models.write("llama", tmp_path), {"sliding_window": 8})
    HuggingFaceCheckpoint(directory)
    types = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match="sliding_window=8; allowed: null, or at least"):
        HuggingFaceCheckpoint(change_config(directory, {"layer_types": types}))


def windows_of(directory: Path, **changes: Any) -> list[int | None]:
    """The window of each layer, with some fields of config.json changed."""
    spec = HuggingFaceCheckpoint(change_config(directory, changes)).spec
    return [kind.window for kind in family_of(spec).kinds(spec)]


def test_mistral_windows(tmp_path: Path):
    """A window as long as the context never slides; one that is not written is 4,096."""
    directory = tiny_models.write("mistral", tmp_path)
    assert windows_of(directory, sliding_window=64) == [None] * 3
    assert windows_of(directory, sliding_window=32) == [32] * 3
    config = json.loads((directory / "config.json").read_text())
    del config["sliding_window"]
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    assert windows_of(directory) == [4096] * 3
    assert windows_of(directory, layer_types=["full_attention"] * 3) == [None] * 3


def test_qwen2_windows(tmp_path: Path):
    directory = tiny_models.write("qwen2", tmp_path)
    assert windows_of(directory, sliding_window=32) == [None] * 3
    change_config(directory, {"use_sliding_window": True})
    assert windows_of(directory, max_window_layers=2) == [None, None, 32]
    assert windows_of(directory, max_window_layers=3) == [None] * 3  # of three none is the fourth
    types = ["full_attention", "attention", "sliding_attention"]
    assert windows_of(directory, max_window_layers=0, layer_types=types) == [None, None, 32]


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xef\xbb\xbf{}",
        b"\xff\xfe{\x00}\x00",
        b'{"vocab_size": ' + b"9" * 5000 + b"}",
        b"",
        b"null",
        b"3",
    ],
)
def test_a_config_that_is_no_json_object(text: bytes, tmp_path: Path):
    directory = tiny_models.write("llama", tmp_path)
    (directory / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"config\.json: (not readable JSON|must hold)") as refusal:
        HuggingFaceCheckpoint(directory)
    assert "\n" not in str(refusal.value)


def test_long_values_are_shortened_in_refusals(tmp_path: Path):
    changes = {"hidden_act": "x" * 10_000, "model_type": [["y"] * 999] * 99}
    for name, value in changes.items():
        directory = change_config(tiny_models.write("llama", tmp_path / name), {name: value})
        with pytest.raises(ValueError, match=name) as refusal:
            HuggingFaceCheckpoint(directory)
        assert len(str(refusal.value)) < 800


def test_files_missing_or_malformed(tmp_path: Path):
    directory = tiny_models.write("smollm2", tmp_path / "model")
    part = directory / "model-00002-of-00002.safetensors"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"00002-of-00002\.safetensors: not a readable"):
        HuggingFaceCheckpoint(directory)
    part.unlink()
    with pytest.raises(ValueError, match=r"00002-of-00002\.safetensors: not a readable"):
        HuggingFaceCheckpoint(directory)
    index = directory / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(ValueError, match="weight_map=None; allowed"):
        HuggingFaceCheckpoint(directory)
    index.unlink()
    with pytest.raises(ValueError, match="holds neither"):
        HuggingFaceCheckpoint(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not readable JSON"):
        HuggingFaceCheckpoint(directory)


def test_integer_tensors_are_refused(tmp_path: Path):
    directory = tiny_models.write("llama", tmp_path)
    found = tiny_models.tensors("llama")
    found["lm_head.weight"] = found["lm_head.weight"].astype(np.int8)
    save_file(found, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight is I8; allowed"):
        HuggingFaceCheckpoint(directory)


def test_sources_that_are_no_model(tmp_path: Path):
    for source in ("smollm3", str(tmp_path), str(tmp_path / "absent")):
        with pytest.raises(ValueError, match=r"allowed: a name \(smollm2-135m-instruct\)"):
            open_checkpoint(source)
