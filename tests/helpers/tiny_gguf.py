"""Writes tiny GGUF files as llama.cpp's converter does: with its names, and rows of Q and K
interleaved."""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFEndian, GGUFWriter
from gguf.quants import quantize

from tests.helpers import tiny_models

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
}

_SANDWICH = {
    "post_self_attn_layernorm": "post_attention_norm",
    "post_mlp_layernorm": "post_ffw_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_SANDWICHED = ("olmo2", "glm4", "gemma2", "gemma3")
_INTERLEAVED = ("llama", "granite", "smollm3")
"""Architectures whose Q and K the converter interleaves."""

Q8_0 = GGMLQuantizationType.Q8_0
F32 = GGMLQuantizationType.F32


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Put pairs of dimensions that RoPE rotates, which are half a head apart, side by side."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path,
    model: str = "llama",
    *,
    kind: GGMLQuantizationType = F32,
    metadata: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    arch: str | None = None,
    big_endian: bool = False,
    tensors_a_shard: int = 0,
) -> Path:
    """Write tiny model `model` with matrices of type `kind`; return `path`, or that of the first
    shard.

    `metadata` adds or, with None, drops keys; `extra` adds or replaces tensors by their GGUF names;
    `arch` overrides the model's architecture; `tensors_a_shard` splits the file.
    """
    config = tiny_models.TINY_MODELS[model]
    arch = arch or config["model_type"].removesuffix("_text")
    order = GGUFEndian.BIG if big_endian else GGUFEndian.LITTLE
    writer = GGUFWriter(path, arch, endianess=order, split_max_tensors=tensors_a_shard)
    fields: dict[str, Any] = {
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": config["num_attention_heads"],
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
        f"{arch}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{arch}.rope.freq_base": config.get("rope_theta", 10000.0),
        "tokenizer.ggml.eos_token_id": 2,
    } | (metadata or {})
    head_dim = config.get("head_dim")
    if head_dim is not None and arch not in ("llama", "mistral"):
        lengths = {f"{arch}.attention.{part}_length": head_dim for part in ("key", "value")}
        fields = lengths | fields
    for key, value in fields.items():
        _add(writer, key, value)
    for name, values in _by_part(tiny_models.tensors(model)).items():
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1  # as the converter does
        if arch in _INTERLEAVED and ("q_proj" in name or "k_proj" in name):
            key = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            values = interleave(values, config[key])
        stored = quantize(values, kind) if values.ndim > 1 and kind != F32 else values
        raw = kind if values.ndim > 1 and kind != F32 else None
        gguf_name = _gguf_name(name, arch)
        if gguf_name not in (extra or {}):
            writer.add_tensor(gguf_name, stored, raw_dtype=raw)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shards = sorted(path.parent.glob(f"{path.stem}-*-of-*{path.suffix}"))
    return shards[0] if tensors_a_shard else path


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def _by_part(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Part the matrices of experts that the converter keeps apart."""
    found = {}
    for name, values in tensors.items():
        stem, _, part = name.rpartition("mlp.experts.")
        if part == "gate_up_proj":
            for half, its_part in zip(np.split(values, 2, axis=1), ("gate", "up"), strict=True):
                found[f"{stem}ffn_{its_part}_exps.weight"] = half
        elif part == "down_proj":
            found[f"{stem}ffn_down_exps.weight"] = values
        else:
            found[name] = values
    return found


def _gguf_name(name: str, arch: str) -> str:
    names = _NAMES | (_SANDWICH if arch in _SANDWICHED else {})
    if arch.startswith("gemma") or arch == "olmo2":
        names |= {"post_attention_layernorm": "post_attention_norm"}
    stem, suffix = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{names.get(part, part)}.{suffix}"
    return f"{names[stem]}.{suffix}"
