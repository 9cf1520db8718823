"""Which metadata keys of an architecture a GGUF reader may meet, and with which values.

A key under the name of the architecture describes the function that the model computes. A reader
that passes over one computes another model, so a key is either read, known to change nothing, or
refused by name. A key that llama.cpp does not know either is refused too: who wrote it thought that
it matters.
"""

from collections.abc import Callable
from typing import Any

from pdjax.formats.gguf_metadata import Metadata

_READ = frozenset(
    [
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "vocab_size",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.attn_factor",
        "rope.scaling.yarn_ext_factor",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
    ]
)
"""Keys that the reader of checkpoints uses."""

_SILENT = frozenset(
    # How the converter found the weights; it stores them in one order.
    ["tensor_data_layout", "rope.scaling.finetuned", "pooling_type", "attention.layer_norm_epsilon"]
)
"""Keys that do not change the logits, whatever their value."""

_ZERO = frozenset(
    [
        "expert_count",
        "expert_used_count",
        "expert_shared_count",
        "expert_group_count",
        "expert_group_used_count",
        "expert_feed_forward_length",
        "expert_shared_feed_forward_length",
        "expert_chunk_feed_forward_length",
        "experts_per_group",
        "leading_dense_block_count",
        "moe_every_n_layers",
        "moe_latent_size",
        "interleave_moe_layer_step",
        "nextn_predict_layers",
        "n_deepstack_layers",
        "expert_gating_func",
        "expert_weights_norm",
        "expert_weights_scale",
        "use_parallel_residual",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "router_logit_softcapping",
        "attention.clamp_kqv",
        "attention.max_alibi_bias",
        "attention.temperature_length",
        "attention.temperature_scale",
        "attention.shared_kv_layers",
        "attention.q_lora_rank",
        "attention.kv_lora_rank",
        "attention.relative_buckets_count",
        "rope.scaling.alpha",
        "rope.scaling.yarn_log_multiplier",
    ]
)
"""Keys of features that are off where the value is 0."""

_ONE = frozenset(["logit_scale", "residual_scale", "embedding_scale", "attention.output_scale"])
"""Keys of factors that change nothing where the value is 1; 0 means that there is none."""


def check_keys(meta: Metadata, arch: str, head_dim: int, width: int) -> None:
    """Refuse the keys of `arch` that would make another model than the one that is read.

    Raises:
      ValueError: naming the key, its value and the values allowed.
    """
    allowed: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "attention.causal": ("true", lambda value: value is True),
        "attention.scale": (
            "1 / sqrt of the head dimension",
            lambda value: _is_number(value) and (not value or abs(value**2 * head_dim - 1) < 1e-5),
        ),
        "embedding_length_out": ("the embedding length", lambda value: value in (0, width)),
        **dict.fromkeys(_ZERO, ("0", lambda value: _is_number(value) and value == 0)),
        **dict.fromkeys(_ONE, ("1", lambda value: _is_number(value) and value in (0, 1))),
    }
    for key in meta.keys(f"{arch}."):
        name = key.removeprefix(f"{arch}.")
        if name in _READ or name in _SILENT:
            continue
        if name not in allowed:
            raise meta.refuse(key, "no such key; the model it describes is not supported")
        words, holds = allowed[name]
        if not holds(meta.get(key)):
            raise meta.refuse(key, words)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
