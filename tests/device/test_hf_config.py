"""Configurations of Hugging Face directories that are refused, each by its field."""

import json
from pathlib import Path
from typing import Any

import pytest

from pdjax.core.model_spec import RopeSpec
from pdjax.core.moe_spec import MoeSpec
from pdjax.device.checkpoints.hf_config import read_config
from pdjax.device.checkpoints.huggingface import HuggingFaceCheckpoint
from pdjax.device.models.registry import FAMILIES
from tests.helpers import tiny_models


def change_config(directory: Path, changes: dict[str, Any]) -> Path:
    """Set fields of `config.json`."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("qwen3", {"attention_bias": True}, r"attention_bias=True; allowed: false"),
        ("qwen3", {"head_dim": None}, r"head_dim=None; allowed: an integer"),
        ("olmo2", {"clip_qkv": 8.0}, r"clip_qkv=8\.0; allowed"),
        ("granite", {"logits_scaling": 0}, r"logits_scaling=0; allowed: a positive"),
        ("granite", {"mlp_bias": True}, r"mlp_bias=True; allowed: false"),
        ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers=\[1, 0\]; allowed: 0 or 1"),
        ("smollm3", {"use_sliding_window": True}, r"use_sliding_window=True; allowed: false"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_type='linear'; all"),
        ("phi3", {"partial_rotary_factor": 0.45}, r"factor=0\.45; allowed: a share of head_dim=16"),
        (
            "phi3",
            {"rope_scaling": {"type": "su"}},
            r"long_factor=None; allowed: a list of positive",
        ),
        (
            "phi3_longrope",
            {"rope_scaling": {"type": "su", "long_factor": [1.0], "short_factor": [1.0]}},
            r"rope\.divisors: 1 numbers; longrope needs 6",
        ),
        ("glm4", {"partial_rotary_factor": 2.0, "rope_parameters": None}, r"factor=2\.0; allowed"),
        (
            "mixtral",
            {"num_local_experts": 0},
            r"num_local_experts=0; allowed: an integer of at least",
        ),
        (
            "mixtral",
            {"num_local_experts": 4096},
            r"gate\.weight has shape \(4, 64\); .* \(4096, 64\)",
        ),
        ("mixtral", {"num_experts_per_tok": 5}, r"experts_per_token=5: must be .* at most 4"),
        ("llama", {"num_experts": 8}, r"num_experts=8; allowed: False"),
        ("qwen2_moe", {"mlp_only_layers": 1}, r"mlp_only_layers=1; allowed: a list of layers"),
        ("qwen2_moe", {"use_sliding_window": True}, r"use_sliding_window=True; allowed: false, or"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, r"some layer must have experts"),
        ("qwen3_moe", {"norm_topk_prob": 1}, r"norm_topk_prob=1; allowed: true or false"),
        ("gemma2", {"hidden_activation": "relu"}, r"hidden_activation='relu'; allowed: gelu_py"),
        ("gemma2", {"attn_logit_softcapping": -1}, r"attn_logit_softcapping=-1; allowed: a pos"),
        ("gemma3", {"use_bidirectional_attention": True}, r"bidirectional_attention=True; allowed"),
        ("gemma3", {"sliding_window": None}, r"sliding_window=None; allowed: a number of tokens"),
        (
            "gemma3",
            {"rope_parameters": {"rope_theta": 1.0}},
            r"rope_theta=1\.0; allowed: an object",
        ),
    ],
)
def test_families_refuse_what_they_do_not_compute(
    model: str, changes: dict[str, Any], message: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        HuggingFaceCheckpoint(change_config(tiny_models.write(model, tmp_path), changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type='gpt2'; allowed: llama, mistral, qwen2"),
        ({"mlp_bias": True}, r"mlp_bias=True; allowed: false"),
        ({"attention_bias": True}, r"attention_bias=True; allowed: false"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'; allowed: silu"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config=.*allowed: none"),
        ({"hidden_size": None}, r"hidden_size=None; allowed: an integer"),
        ({"hidden_size": "big"}, r"hidden_size='big'; allowed: an integer"),
        ({"rope_theta": -1}, r"rope_theta=-1; allowed: a positive number"),
        ({"rope_scaling": [1]}, r"rope_scaling=\[1\]; allowed: an object"),
        ({"rope_scaling": {"type": "dynamic"}}, r"type='dynamic'; allowed: default, linear"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"factor=None; allowed: a positive number"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5; allowed: 1.0"),
        ({"num_key_value_heads": 3}, r"config\.json: kv_heads=3: must divide"),
        (
            {"quantization_config": {"quant_method": "gptq", "x": list(range(999))}},
            r"quantization_config: quant_method='gptq'; allowed: none; load float weights[^[]*$",
        ),
        ({"quantization_config": "int8"}, r"quantization_config='int8'; allowed: none"),
        ({"compression_config": {"format": "x"}}, r"compression_config=.*allowed: none"),
        ({"quantization": {"bits": 4}}, r"quantization=\{'bits': 4\}; allowed: none"),
        ({"model_type": "gemma3"}, r"model_type='gemma3'; allowed: llama, .*, gemma3_text"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\]; allowed: llama, mistral, qwen2"),
        ({"embedding_multiplier": 12.0}, r"embedding_multiplier=12\.0; allowed: 1\.0, or no such"),
        ({"residual_multiplier": 0.22}, r"residual_multiplier=0\.22; allowed: 1\.0"),
        ({"embedding_multiplier": 10**400}, r"embedding_multiplier=<integer of 1329 bits>; all"),
        ({"query_pre_attn_scalar": 10**400}, r"query_pre_attn_scalar=<integer of 1329 bits>; all"),
        ({"attention_multiplier": 0.5}, r"attention_multiplier=0\.5; allowed: 0\.25, or no such"),
        ({"logits_scaling": 8}, r"logits_scaling=8; allowed: 1\.0"),
        ({"logit_scale": 0.06}, r"logit_scale=0\.06; allowed: 1\.0"),
        ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping=30\.0; allowed: False"),
        ({"no_rope_layers": [1, 0, 1]}, r"no_rope_layers=\[1, 0, 1\]; allowed"),
        ({"use_qk_norm": True}, r"use_qk_norm=True; allowed"),
        ({"num_local_experts": 8}, r"num_local_experts=8; allowed"),
        ({"mlp_layer_types": ["sparse"] * 3}, r"mlp_layer_types=.*; allowed: dense"),
        ({"is_causal": False}, r"is_causal=False; allowed: True"),
        ({"per_layer_config": {"1": {}}}, r"per_layer_config=.*; allowed"),
        ({"layer_types": ["conv"] * 3}, r"layer_types=.*; allowed: full_attention, attention"),
        ({"layer_types": ["attention"]}, r"layer_types=.*num_hidden_layers=3"),
        ({"layer_types": [[]] * 3}, r"layer_types=.*; allowed: full_attention"),
        ({"layer_types": ["sliding_attention"] * 3, "sliding_window": None}, "layer_types=.*full"),
        ({"tie_word_embeddings": "false"}, r"tie_word_embeddings='false'; allowed: true or false"),
        ({"attention_bias": 1}, r"attention_bias=1; allowed: true or false"),
        ({"hidden_act": ["silu"]}, r"hidden_act=\['silu'\]; allowed: silu"),
        ({"num_hidden_layers": 2**40}, r"num_hidden_layers=1099511627776; allowed: an"),
        ({"num_hidden_layers": 10**9}, r"num_layers=1000000000: must be at least 1 and at most"),
        ({"vocab_size": 2**40}, r"vocab_size=1099511627776; allowed: an integer of at most"),
        (
            {"num_attention_heads": 10**4000},
            r"num_attention_heads=<integer of 13288 bits>; allowed",
        ),
        ({"head_dim": 2**40}, r"head_dim=1099511627776; allowed"),
        ({"head_dim": 0}, r"head_dim=0; allowed: an integer of at least 1"),
        ({"head_dim": 5}, r"head_dim=5: RoPE needs an even"),
        ({"num_attention_heads": 128}, r"hidden_size=64; allowed: a multiple"),
        ({"num_attention_heads": 3}, r"hidden_size=64; allowed: a multiple"),
        ({"max_position_embeddings": 2**40}, r"max_position_embeddings=1099511627776; allowed"),
        ({"max_position_embeddings": None}, r"max_position_embeddings=None; allowed"),
        ({"num_hidden_layers": True}, r"num_hidden_layers=True; allowed: an integer"),
        ({"rms_norm_eps": float("nan")}, r"rms_norm_eps=nan; allowed: a positive number"),
        ({"rms_norm_eps": float("inf")}, r"rms_norm_eps=inf; allowed: a positive number"),
        ({"rope_theta": 10**400}, r"rope_theta=<integer of 1329 bits>; allowed: a positive number"),
        (
            {"rope_theta": 1e-30, "rope_scaling": {"type": "linear", "factor": 1e-30}},
            "frequencies are not finite",
        ),
        ({"rope_theta": 1e-60}, r"rope_theta=1e-60; allowed: a positive number, 1e-30 to"),
        ({"rope_theta": None}, r"rope_theta=None; allowed: a positive number"),
        (
            {"intermediate_size": 80},
            r"gate_proj\.weight has shape \(96, 64\); .* makes it \(80, 64\)",
        ),
        ({"num_hidden_layers": 4}, r"model\.layers\.3\.\S+ is missing; expected shape \(64,\)"),
        ({"num_hidden_layers": 2}, r"model\.layers\.2\.\S+ .*has no place"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, tmp_path: Path):
    directory = change_config(tiny_models.write("llama", tmp_path), changes)
    with pytest.raises(ValueError, match=message):
        HuggingFaceCheckpoint(directory)


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_scaling": YARN, "rope_theta": 1}, r"rope_theta=1; allowed: another number"),
        ({"rope_scaling": YARN | {"factor": 0}}, r"factor=0; allowed: a positive number"),
        ({"rope_scaling": YARN | {"factor": 1e300}}, r"factor=1e\+300; allowed: a positive"),
        ({"rope_scaling": YARN | {"factor": 1e29}}, r"context=\d+\.*\d*: must be at least 1"),
        ({"rope_scaling": YARN | {"attn_factor": 2.0}}, r"attn_factor=2\.0; allowed: 1\.0"),
        ({"rope_scaling": YARN, "attn_factor": 2.0}, r"attn_factor=2\.0; allowed: 1\.0"),
        ({"rope_scaling": YARN | {"mscale": "x", "mscale_all_dim": 1}}, r"mscale='x'; allowed"),
        ({"rope_scaling": YARN | {"beta_fast": [1]}}, r"beta_fast=\[1\]; allowed"),
        ({"rope_scaling": YARN | {"beta_slow": 5e-324}}, r"beta_slow=5e-324; allowed: .* 1e-30 to"),
        ({"rope_scaling": YARN | {"truncate": "no"}}, r"truncate='no'; allowed: true or false"),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": None},
            r"json: original_max_position_embeddings=None; allowed: an integer",
        ),
        ({"rope_scaling": {"type": None}}, r"rope_scaling: type=None; allowed: default, linear"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, r"rope_type=\['yarn'\]; allowed: default"),
        ({"rope_scaling": True}, r"rope_scaling=True; allowed: an object"),
        ({"rope_scaling": 0}, r"rope_scaling=0; allowed: an object"),
        ({"rope_parameters": False}, r"rope_parameters=False; allowed: an object"),
        (
            {"rope_parameters": {"full_attention": YARN, "sliding_attention": {}}},
            r"rope_parameters: full_attention=.*; allowed: one object for all layers",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}},
            r"low_freq_factor=None; allowed: a positive number; the field is missing",
        ),
    ],
)
def test_ropes_that_are_refused(rope: dict[str, Any], message: str, tmp_path: Path):
    directory = change_config(tiny_models.write("llama", tmp_path), rope)
    with pytest.raises(ValueError, match=message) as refusal:
        HuggingFaceCheckpoint(directory)
    assert "\n" not in str(refusal.value)


def test_rope_scaling_replaces_rope_parameters(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """As in transformers the whole object counts, the base in the other one does not."""
    directory = change_config(
        tiny_models.write("llama", tmp_path),
        {
            "rope_theta": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "rope_scaling": YARN | {"original_max_position_embeddings": 32},
        },
    )
    config = json.loads((directory / "config.json").read_text())
    del config["rope_theta"]
    (directory / "config.json").write_text(json.dumps(config))
    spec = HuggingFaceCheckpoint(directory).spec
    assert spec.rope == RopeSpec(theta=1e4, kind="yarn", factor=4.0, original_context=32)
    assert spec.context == 128
    assert "replaces rope_parameters" in caplog.text


def test_layers_without_experts(tmp_path: Path):
    """Those that a list names, and all but the last of every so many."""
    directory = change_config(tiny_models.write("qwen2_moe", tmp_path), {"mlp_only_layers": [1]})
    with pytest.raises(ValueError, match=r"dense_layers=\(0, 1, 2\): some layer must have experts"):
        HuggingFaceCheckpoint(directory)
    config = read_config(change_config(directory, {"decoder_sparse_step": 1}))
    spec = FAMILIES["qwen2_moe"].spec(config)
    assert isinstance(spec, MoeSpec)
    assert (spec.dense_layers, spec.num_experts, spec.normalised) == ((1,), 6, False)
    config = read_config(change_config(directory, {"num_local_experts": 5}))
    with pytest.raises(ValueError, match="num_experts=6; allowed: 5, as num_local_experts says"):
        FAMILIES["qwen2_moe"].spec(config)
