"""GGUF files: names, orientation, Q/K order, slices, RoPE scaling, and refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, Keys
from gguf.quants import dequantize

from pdjax.core.model_spec import RopeSpec
from pdjax.device.checkpoints import gguf
from pdjax.device.checkpoints.gguf import ROPE_FACTORS, GGUFCheckpoint
from pdjax.device.checkpoints.gguf_keys import check_keys
from pdjax.device.checkpoints.huggingface import HuggingFaceCheckpoint
from pdjax.formats.gguf_file import GGUFFile
from pdjax.formats.gguf_metadata import Metadata
from tests.helpers import tiny_models
from tests.helpers.tiny_gguf import Q8_0, write_gguf


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
        ({"llama.block_count": 2}, r"blk\.2\.\S+ .*has no place"),
        ({"llama.context_length": None}, r"lacks llama\.context_length"),
        ({"llama.context_length": "long"}, r"llama\.context_length='long'; allowed: one integer"),
        ({"llama.expert_group_count": 8}, r"llama\.expert_group_count=8; allowed: 0"),
        ({"llama.expert_count": 8}, "experts_per_token=0: must be at least 1 and at most 8"),
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


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_biases_of_architecture_llama_are_those_of_hugging_face(part: str, tmp_path: Path):
    """The converter interleaves the biases of Q and K with their weights."""
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", "qwen2", arch="llama"))
    assert checkpoint.spec.qkv_bias
    for name, values in tiny_models.tensors("qwen2").items():
        if f"{part}_proj" in name:
            np.testing.assert_array_equal(checkpoint.read(name), values, err_msg=name)
            np.testing.assert_array_equal(checkpoint.read(name, slice(7, 29)), values[7:29])


def test_a_head_of_its_own_is_read(tmp_path: Path):
    head = np.random.default_rng(0).normal(size=(101, 64)).astype(np.float32)
    path = write_gguf(tmp_path / "m.gguf", "smollm2", extra={"output.weight": head})
    checkpoint = GGUFCheckpoint(path)
    assert not checkpoint.spec.tied
    np.testing.assert_array_equal(checkpoint.read("lm_head.weight"), head)
    assert GGUFCheckpoint(write_gguf(tmp_path / "tied.gguf", "smollm2")).spec.tied


YARN = {
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 4.0,
    "llama.rope.scaling.original_context_length": 16,
}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (YARN, {}),
        (YARN | {"llama.rope.scaling.yarn_attn_factor": 1.25}, {"attention_factor": 1.25}),
        (YARN | {"llama.rope.scaling.yarn_beta_fast": 4.0}, {"beta_fast": 4.0}),
        (YARN | {"llama.rope.scaling.yarn_beta_slow": 0.25}, {"beta_slow": 0.25}),
        (YARN | {"llama.rope.scaling.yarn_ext_factor": 1.0}, {}),
        (YARN | {"llama.rope.scaling.yarn_ext_factor": -1.0}, {}),
        (YARN | {"llama.rope.scaling.original_context_length": None}, {"original_context": 64}),
        (
            YARN | {"llama.rope.scaling.attn_factor": 2.0},
            {"attention_factor": 2 * (0.1 * np.log(4.0) + 1)},
        ),
    ],
)
def test_yarn_of_the_metadata(metadata: dict[str, Any], expected: dict[str, Any], tmp_path: Path):
    """The converter names what it copies from config.json; the meaning is that of config.json."""
    found = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", metadata=metadata)).spec.rope
    right: dict[str, Any] = {"kind": "yarn", "factor": 4.0, "original_context": 16} | expected
    same = RopeSpec(**right)
    np.testing.assert_allclose(found.frequencies(16)[0], same.frequencies(16)[0])
    assert found.frequencies(16)[1] == pytest.approx(same.frequencies(16)[1])


@pytest.mark.parametrize(
    ("metadata", "rope"),
    [
        ({"llama.rope.scaling.factor": 2.0}, RopeSpec(kind="linear", factor=2.0)),
        ({"llama.rope.scale_linear": 2.0}, RopeSpec(kind="linear", factor=2.0)),
        ({"llama.rope.scaling.factor": 0.0}, RopeSpec()),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 2.0}, RopeSpec()),
        ({"llama.rope.scaling.finetuned": True}, RopeSpec()),
    ],
)
def test_scaling_without_a_type_is_linear(metadata: dict[str, Any], rope: RopeSpec, tmp_path: Path):
    """As in llama.cpp, also under the factor's old name."""
    assert GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", metadata=metadata)).spec.rope == rope


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.causal", False),
        ("attention.scale", 0.5),
        ("attention.clamp_kqv", 8.0),
        ("attention.max_alibi_bias", 8.0),
        ("attention.temperature_scale", 0.1),
        ("attention.sliding_window_pattern", 2),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("logit_scale", 0.0625),
        ("residual_scale", 0.22),
        ("embedding_scale", 12.0),
        ("expert_used_count", 2),
        ("nextn_predict_layers", 1),
        ("rope.dimension_sections", [4, 4, 0, 0]),
        ("rope.freq_base_swa", 1e4),
        ("rope.scaling.attn_factor", 1.5),
        ("rope.scaling.yarn_log_multiplier", 0.1),
        ("rope.freq_base", float("nan")),
        ("rope.freq_base", 0.0),
        ("rope.scaling.factor", float("inf")),
        ("rope.scaling.factor", -2.0),
        ("attention.layer_norm_rms_epsilon", -1e-5),
        ("attention.layer_norm_rms_epsilon", float("nan")),
        ("block_count", 3 | 1 << 30),
        ("block_count", 0),
        ("context_length", 1 << 31),
        ("attention.key_length", 0),
        ("vocab_size", 100),
        ("vocab_size", 102),
        ("an_invention", 1),
        ("an_invention", "of somebody"),
        ("an_invention", [4, 5]),
    ],
)
def test_a_key_that_would_make_another_model_is_refused(key: str, value: Any, tmp_path: Path):
    path = write_gguf(tmp_path / "m.gguf", metadata={f"llama.{key}": value})
    with pytest.raises(ValueError, match=rf"^model='.*': llama\.{key}=.*; allowed: ") as caught:
        GGUFCheckpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.causal", True),
        ("attention.scale", 0.25),
        ("attention.layer_norm_epsilon", 1e-6),
        ("logit_scale", 1.0),
        ("expert_count", 0),
        ("expert_used_count", 0),
        ("use_parallel_residual", False),
        ("tensor_data_layout", "Meta AI original pth"),
        ("vocab_size", 101),
        ("rope.dimension_count", 16),
    ],
)
def test_a_key_that_changes_nothing_is_let_pass(key: str, value: Any, tmp_path: Path):
    plain = GGUFCheckpoint(write_gguf(tmp_path / "plain.gguf")).spec
    path = write_gguf(tmp_path / "m.gguf", metadata={f"llama.{key}": value})
    assert GGUFCheckpoint(path).spec == plain


def test_every_key_that_the_gguf_package_knows_is_read_or_refused(tmp_path: Path):
    """The package lists the keys of llama.cpp; a number that means something is passed over for
    none of them, unless it cannot change the logits.
    """
    known = [
        value.removeprefix("{arch}.")
        for group in (Keys.LLM, Keys.Attention, Keys.Rope)
        for value in vars(group).values()
        if isinstance(value, str) and value.startswith("{arch}.")
    ]
    plain = write_gguf(tmp_path / "plain.gguf")
    there = GGUFFile(plain).fields
    passed = set()
    for name in known:
        if f"llama.{name}" not in there:
            try:
                check_keys(with_field(plain, f"llama.{name}", 7), "llama", 16, 64)
            except ValueError:
                continue
            passed.add(name)
    assert passed == {
        "attention.key_length",
        "attention.layer_norm_epsilon",
        "attention.sliding_window",
        "attention.value_length",
        "pooling_type",
        "rope.dimension_count",
        "rope.scaling.attn_factor",
        "rope.scaling.factor",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "rope.scaling.yarn_ext_factor",
        "tensor_data_layout",
        "vocab_size",
    }


def with_field(path: Path, key: str, value: Any) -> Metadata:
    file = GGUFFile(path)
    file.fields[key] = value
    return Metadata(path, file)


def test_other_kinds_of_gguf_files_are_named(tmp_path: Path):
    path = write_gguf(tmp_path / "m.gguf", metadata={"general.type": "adapter"})
    with pytest.raises(ValueError, match=r"general\.type='adapter'; allowed: 'model'"):
        GGUFCheckpoint(path)
    factors = np.ones(8, np.float32)
    path = write_gguf(tmp_path / "f.gguf", metadata=YARN, extra={ROPE_FACTORS: factors})
    with pytest.raises(ValueError, match=r"rope\.scaling\.type='yarn'; allowed: none beside"):
        GGUFCheckpoint(path)
    path = write_gguf(tmp_path / "s.gguf", extra={ROPE_FACTORS: factors[:4]})
    with pytest.raises(ValueError, match=r"rope_freqs\.weight is F32 of shape \(4,\); allowed"):
        GGUFCheckpoint(path)
    assert (
        GGUFCheckpoint(write_gguf(tmp_path / "o.gguf", extra={ROPE_FACTORS: factors})).spec.rope
        == RopeSpec()
    )


def test_no_end_of_text_is_said_once_at_loading(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = write_gguf(tmp_path / "m.gguf", metadata={"tokenizer.ggml.eos_token_id": None})
    assert GGUFCheckpoint(path).spec.eos_token_ids == ()
    assert caplog.text.count("no token is named as the end of a text") == 1


@pytest.mark.parametrize("model", [None, "none", "no_vocab"])
def test_a_file_without_a_vocabulary_serves_token_ids(
    model: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = write_gguf(tmp_path / "m.gguf", metadata={"tokenizer.ggml.model": model})
    assert GGUFCheckpoint(path).tokenizer() is None
    assert "the file holds no vocabulary; prompts must be token ids" in caplog.text


def test_a_vocabulary_longer_than_the_embedding_is_refused(tmp_path: Path):
    tokens = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(102)]}
    with pytest.raises(ValueError, match="holds 102 tokens; allowed: at most 101"):
        GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", metadata=tokens))
    end = {"tokenizer.ggml.eos_token_id": 101}
    with pytest.raises(ValueError, match="token 101 is named as the end of a text; allowed: 0"):
        GGUFCheckpoint(write_gguf(tmp_path / "e.gguf", metadata=end))


def test_a_matrix_is_dequantised_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Dequantising takes several times the memory of its result, so no piece is large."""
    path = write_gguf(tmp_path / "m.gguf", "llama", kind=Q8_0)
    names = [f"model.layers.0.{part}.weight" for part in ("self_attn.q_proj", "mlp.up_proj")]
    whole = [GGUFCheckpoint(path).read(name) for name in names]
    sizes = []

    def measured(stored: np.ndarray, kind: Any) -> np.ndarray:
        sizes.append(stored.size // GGML_QUANT_SIZES[kind][1])
        return dequantize(stored, kind)

    monkeypatch.setattr(gguf, "_CHUNK", 300)
    monkeypatch.setattr(gguf, "_AT_ONCE", 96)
    monkeypatch.setattr(gguf, "dequantize", measured)
    checkpoint = GGUFCheckpoint(path)
    for name, values in zip(names, whole, strict=True):
        np.testing.assert_array_equal(checkpoint.read(name), values)
        np.testing.assert_array_equal(
            checkpoint.read(name, slice(3, 50), slice(7, 40)), values[3:50, 7:40]
        )
    assert max(sizes) == 96 // GGML_QUANT_SIZES[Q8_0][0]
