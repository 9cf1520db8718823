"""Which metadata keys of an architecture a GGUF reader may meet, and with which values.

A key under the name of the architecture describes the function that the model computes. A reader
that passes over one computes another model, so a key is either read, known to change nothing, or
refused by name. A key that llama.cpp does not know either is refused too: who wrote it thought that
it matters.
"""

from collections.abc import Callable, Collection
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


class ArchKeys:
    """The keys under the name of an architecture, for its family to read.

    Attributes:
      head_dim: of the model.
    """

    def __init__(self, meta: Metadata, arch: str, head_dim: int) -> None:
        self._meta, self._arch, self.head_dim = meta, arch, head_dim

    def integer(self, name: str, default: int) -> int:
        """Read an integer, `default` where there is none."""
        return self._meta.integer(f"{self._arch}.{name}", default)

    def number(self, name: str, default: float) -> float:
        """Read a finite number of 0 or more, `default` where there is none."""
        value = self._meta.number(f"{self._arch}.{name}", default)
        if value < 0:
            raise self._meta.refuse(f"{self._arch}.{name}", "0 or more", value)
        return value


def check_keys(
    meta: Metadata, arch: str, head_dim: int, width: int, honoured: Collection[str] = ()
) -> None:
    """Refuse the keys of `arch` that would make another model than the one that is read; its family
    reads those `honoured`.

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
        if name in _READ or name in _SILENT or name in honoured:
            continue
        if name not in allowed:
            raise meta.refuse(key, "no such key; the model it describes is not supported")
        words, holds = allowed[name]
        if not holds(meta.get(key)):
            raise meta.refuse(key, words)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
