"""GGUF files: names, orientation, Q/K order, slices, RoPE scaling, and refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdjax.device.model.checkpoints.gguf import ROPE_FACTORS, GGUFCheckpoint
from pdjax.device.model.checkpoints.huggingface import HuggingFaceCheckpoint
from pdjax.model_spec import RopeSpec
from tests.parity import tiny_models
from tests.unit.tiny_gguf import Q8_0, write_gguf


@pytest.mark.parametrize("model", ["llama", "smollm2", "qwen2"])
def test_every_tensor_comes_back_in_hugging_face_order(model: str, tmp_path: Path):
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", model))
    for name, values in tiny_models.tensors(model).items():
        np.testing.assert_array_equal(checkpoint.read(name), values, err_msg=name)


@pytest.mark.parametrize("model", ["llama", "smollm2", "qwen2"])
def test_architecture_is_that_of_the_hugging_face_twin(model: str, tmp_path: Path):
    found = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", model)).spec
    assert found == HuggingFaceCheckpoint(tiny_models.write(model, tmp_path / "hf")).spec


@pytest.mark.parametrize("part", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_slices_of_quantised_tensors(part: str, tmp_path: Path):
    """Slices need not fall on blocks of 32 values."""
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", "llama", kind=Q8_0))
    name = f"model.layers.1.{part}.weight"
    whole = checkpoint.read(name)
    np.testing.assert_allclose(whole, tiny_models.tensors("llama")[name], atol=0.02)
    for rows in (slice(0, 16), slice(7, 41), slice(5, 5)):
        for cols in (slice(None), slice(32, 64), slice(10, 35), slice(63, 64)):
            np.testing.assert_array_equal(checkpoint.read(name, rows, cols), whole[rows, cols])


def test_rope_scaling_in_the_metadata(tmp_path: Path):
    scaling = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 16,
    }
    rope = GGUFCheckpoint(write_gguf(tmp_path / "y.gguf", metadata=scaling)).spec.rope
    same = RopeSpec(kind="yarn", factor=4.0, original_context=16)
    assert rope.kind == "yarn"
    np.testing.assert_allclose(rope.frequencies(16)[0], same.frequencies(16)[0])
    assert rope.frequencies(16)[1] == pytest.approx(same.frequencies(16)[1])
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    rope = GGUFCheckpoint(write_gguf(tmp_path / "l.gguf", metadata=linear)).spec.rope
    assert rope == RopeSpec(kind="linear", factor=2.0)


def test_llama3_scaling_is_recognised_by_its_factors(tmp_path: Path):
    made = RopeSpec(theta=500000.0, kind="llama3", factor=32.0, original_context=8192)
    plain, _ = RopeSpec(theta=500000.0).frequencies(16)
    factors = (plain / made.frequencies(16)[0]).astype(np.float32)
    metadata = {"llama.rope.freq_base": 500000.0}
    path = write_gguf(tmp_path / "a.gguf", metadata=metadata, extra={ROPE_FACTORS: factors})
    assert GGUFCheckpoint(path).spec.rope == made
    path = write_gguf(tmp_path / "b.gguf", metadata=metadata, extra={ROPE_FACTORS: factors[::-1]})
    with pytest.raises(ValueError, match=r"rope_freqs\.weight is not the scaling of Llama 3"):
        GGUFCheckpoint(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.embedding_length": 48}, r"token_embd|model\.embed_tokens\.weight has shape"),
        ({"llama.block_count": 4}, r"model\.layers\.3\.\S+ is missing"),
        ({"llama.block_count": 2}, r"model\.layers\.2\.\S+ .*has no place"),
        ({"llama.context_length": None}, r"lacks llama\.context_length"),
        ({"llama.context_length": "long"}, r"llama\.context_length='long'; allowed: one integer"),
        ({"llama.expert_count": 8}, r"llama\.expert_count=8; allowed: 0"),
        ({"llama.attention.sliding_window": 16}, r"sliding_window=16; allowed"),
        ({"llama.rope.scaling.type": "longrope"}, r"rope\.scaling\.type='longrope'; allowed"),
        ({"general.architecture": "gemma"}, r"general\.architecture='gemma'; allowed: llama"),
    ],
)
def test_refusals(metadata: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", metadata=metadata))


def test_unreadable_files(tmp_path: Path):
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    for size in (0, 3, 20, 200, len(whole) // 2, len(whole) - 1000):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf'"):
            GGUFCheckpoint(tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(b"no gguf at all" * 100)
    with pytest.raises(ValueError, match="not a readable GGUF file"):
        GGUFCheckpoint(tmp_path / "cut.gguf")
    with pytest.raises(ValueError, match="no such file"):
        GGUFCheckpoint(tmp_path / "absent.gguf")
