"""The fields of `config.json` that decoders of the Llama kind share -> ModelSpec.

Which fields those are, and what an absent one means, is as in transformers 5.24.
"""

from collections.abc import Callable, Collection, Mapping

from pdjax.core.model_spec import LARGEST, ModelSpec, RopeSpec
from pdjax.device.checkpoints.hf_features import Windows, read_windows, refuse_features
from pdjax.device.checkpoints.hf_fields import Fields
from pdjax.device.checkpoints.hf_rope import read_rope, stretched_context

COMMON = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
"""What transformers takes for fields that a file leaves out, whatever its model type."""


def read_dense(
    config: Fields,
    family: str,
    absent: Mapping[str, int],
    windows: Windows,
    *,
    qkv_bias: bool = False,
    honoured: Collection[str] = (),
    eps: float = 1e-6,
    tied: bool = False,
    rope: Callable[[Fields, int, int], RopeSpec] = read_rope,
) -> ModelSpec:
    """Read the architecture, but for its end tokens.

    Args:
      config: the file.
      family: name of the family that reads it.
      absent: what transformers takes for a field of this model type that the file leaves out.
      windows: sliding windows that the model type understands the file to ask for.
      qkv_bias: see ModelSpec.
      honoured: fields of features that the family computes and Llama does not.
      eps, tied: what transformers takes for absent `rms_norm_eps` and `tie_word_embeddings`.
      rope: reads the position embedding of a file, a context and a head dim.

    Raises:
      ValueError: naming the field that is missing, malformed or not supported, its value, and what
        is allowed.
    """

    def size(name: str) -> int:
        return config.integer(name, absent[name])

    vocab_size, mlp_dim = size("vocab_size"), size("intermediate_size")
    width, heads = size("hidden_size"), size("num_attention_heads")
    layers, context = size("num_hidden_layers"), size("max_position_embeddings")
    head_dim = _head_dim(config, family, absent, width, heads)
    refuse_features(config, width=width, head_dim=head_dim, honoured=honoured)
    embedding = rope(config, context, head_dim)
    context = stretched_context(embedding, context)
    window, window_layers = read_windows(config, windows, layers=layers, context=context)
    return ModelSpec(
        family=family,
        vocab_size=vocab_size,
        num_layers=layers,
        model_dim=width,
        mlp_dim=mlp_dim,
        query_heads=heads,
        kv_heads=_kv_heads(config, absent, heads),
        head_dim=head_dim,
        context=context,
        rope=embedding,
        norm_eps=config.number("rms_norm_eps", eps),
        tied=config.boolean("tie_word_embeddings", tied),
        qkv_bias=qkv_bias,
        window=window,
        window_layers=window_layers,
    )


def _kv_heads(config: Fields, absent: Mapping[str, int], heads: int) -> int:
    """KV heads; null means as many as query heads, and so does no such field to llama."""
    if config.has("num_key_value_heads"):
        if config.get("num_key_value_heads") is None:
            return heads
        return config.integer("num_key_value_heads")
    return absent.get("num_key_value_heads", heads)


def _head_dim(
    config: Fields, family: str, absent: Mapping[str, int], width: int, heads: int
) -> int:
    if "head_dim" in absent:  # to these types it is a size like any other
        head_dim = config.integer("head_dim", absent["head_dim"])
    elif config.get("head_dim") is not None:
        head_dim = config.integer("head_dim")
    else:
        if width < heads or (family == "llama" and width % heads):
            raise config.refuse(
                "hidden_size", f"a multiple of num_attention_heads={heads}, or head_dim beside it"
            )
        head_dim = width // heads
    if head_dim > LARGEST["head_dim"]:
        raise config.refuse(
            "head_dim" if config.get("head_dim") is not None else "hidden_size",
            f"heads of at most {LARGEST['head_dim']} dimensions",
        )
    return head_dim
