"""GGUF files compared with llama.cpp (text to ids) and with transformers (ids to logits)."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from pdjax.core.kv_layout import split_layers
from pdjax.device.checkpoints.gguf import GGUFCheckpoint
from pdjax.device.checkpoints.open import open_checkpoint
from pdjax.device.mesh import PREFILL_RULES, make_mesh
from pdjax.device.models.weights import load_params
from pdjax.text.gguf_pretokenizers import PRETOKENIZERS
from pdjax.text.tokenizer import Tokenizer
from tests.helpers.dense import dense_logits
from tests.helpers.tiny_gguf import write_gguf
from tests.parity import gguf_models, gguf_tokenizers

STRINGS = gguf_tokenizers.STRINGS + gguf_tokenizers.WITH_TOKENS


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return gguf_tokenizers.read_fixture()


KINDS = {kind: name for name, kind in reversed(PRETOKENIZERS.items())}
"""The first name of each pretokenizer; the fixture's script checks the aliases in llama.cpp."""


@pytest.mark.parametrize("name", KINDS.values())
def test_token_ids_of_every_pretokenizer(name: str, expected: dict[str, Any], tmp_path: Path):
    metadata = gguf_tokenizers.byte_level(expected["merges"], name)
    tokenizer = Tokenizer.open(write_gguf(tmp_path / "m.gguf", metadata=metadata))
    for text, ids in zip(STRINGS, expected["ids"][name], strict=True):
        assert tokenizer.encode(text) == ids, repr(text)
        if not PRETOKENIZERS[name].composed:
            assert tokenizer.decode(tokenizer.encode(text, False), False) == text


@pytest.mark.parametrize("variant", gguf_tokenizers.SENTENCEPIECE)
def test_token_ids_of_sentencepiece(variant: str, expected: dict[str, Any], tmp_path: Path):
    metadata = gguf_tokenizers.sentencepiece(expected["pieces"], variant)
    tokenizer = Tokenizer.open(write_gguf(tmp_path / "m.gguf", metadata=metadata))
    for text, ids in zip(STRINGS, expected["ids"][f"sentencepiece_{variant}"], strict=True):
        assert tokenizer.encode(text) == ids, repr(text)


@pytest.fixture(scope="module")
def right_logits() -> dict[str, np.ndarray]:
    with np.load(gguf_models.FIXTURE) as file:
        return dict(file)


@pytest.mark.parametrize("name", [name for name in gguf_models.MODELS if name != "plain"])
def test_logits_are_those_of_the_hugging_face_directory(
    name: str, right_logits: dict[str, np.ndarray], tmp_path: Path
):
    checkpoint = GGUFCheckpoint(gguf_models.write(name, tmp_path / "m.gguf"))
    layers = split_layers(checkpoint.spec.num_layers, 1)
    mesh = make_mesh(jax.devices()[:1], stages=1, tp=1)
    params = load_params(checkpoint, mesh, PREFILL_RULES, layers, "float32")
    logits = dense_logits(params, gguf_models.token_ids(), spec=checkpoint.spec)
    np.testing.assert_allclose(logits, right_logits[name], rtol=0, atol=1e-3)
    model = gguf_models.MODELS[name]
    if model.same_in_llama_cpp:
        last, by_llama_cpp = jax.nn.log_softmax(logits[-1]), right_logits[f"{name}.llama_cpp"]
        np.testing.assert_allclose(last, by_llama_cpp, rtol=0, atol=model.llama_cpp_error)


@pytest.mark.parametrize(
    "name",
    ["qwen3", "olmo2", "granite", "smollm3", "glm4", "gemma2", "gemma3", "mixtral", "qwen3_moe"],
)
def test_the_architecture_is_that_of_the_hugging_face_directory(name: str, tmp_path: Path):
    found = GGUFCheckpoint(gguf_models.write(name, tmp_path / "m.gguf")).spec
    directory = gguf_models.write_hugging_face(name, tmp_path / "hf")
    assert found == open_checkpoint(directory).spec


def test_the_fixtures_tell_the_models_apart(right_logits: dict[str, np.ndarray]):
    plain = right_logits["plain"]
    for name, model in gguf_models.MODELS.items():
        if model.arch == "llama":
            assert name == "plain" or np.abs(right_logits[name] - plain).max() > 0.5
