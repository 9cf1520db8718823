"""The fields of `config.json` that say which layers have experts, and of what shape.

What an absent field means is as in transformers 5.24.
"""

from typing import Any

from pdjax.device.checkpoints.hf_fields import Fields

COUNTS = ("num_experts", "num_local_experts")
"""Names of the number of experts: transformers 5.24 reads both, and writes the second."""


def count_of_experts(config: Fields, absent: int) -> int:
    """Experts of a layer; `absent` where the file does not say.

    Raises:
      ValueError: the number is none, or the file has two.
    """
    found = {name: config.integer(name) for name in COUNTS if config.has(name)}
    if len(set(found.values())) > 1:
        raise config.refuse(COUNTS[0], f"{found[COUNTS[1]]}, as {COUNTS[1]} says")
    return next(iter(found.values()), absent)


def read_experts(
    config: Fields, layers: int, *, count: int, used: int, mlp_dim: int
) -> dict[str, Any]:
    """Read what Qwen's types say of experts, as fields of a MoeSpec.

    Args:
      config: the file.
      layers: of the model.
      count, used, mlp_dim: experts, those of a token, and the MLP dim of one, where the file does
        not say.

    Raises:
      ValueError: naming the field that is malformed, its value, and what is allowed.
    """
    return {
        "num_experts": count_of_experts(config, count),
        "experts_per_token": config.integer("num_experts_per_tok", used),
        "expert_mlp_dim": config.integer("moe_intermediate_size", mlp_dim),
        "normalised": config.boolean("norm_topk_prob", False),
        "dense_layers": _dense_layers(config, layers),
    }


def _dense_layers(config: Fields, layers: int) -> tuple[int, ...]:
    """Layers without experts: those that the file lists, and all but the last of every so many."""
    listed = config.get("mlp_only_layers", [])
    whole = isinstance(listed, list) and all(type(layer) is int for layer in listed)
    if not whole:
        raise config.refuse("mlp_only_layers", "a list of layers, or no such field")
    step = config.integer("decoder_sparse_step", 1)
    return tuple(layer for layer in range(layers) if layer in listed or (layer + 1) % step)
