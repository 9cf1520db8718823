"""The shapes of a tiny dense model, which steps in a millisecond on a CPU."""

from pdjax.core.model_spec import ModelSpec


def tiny_spec(context: int) -> ModelSpec:
    """Its specification; `context` is the most tokens of a sequence."""
    return ModelSpec(
        vocab_size=101,
        num_layers=4,
        model_dim=32,
        mlp_dim=64,
        query_heads=4,
        kv_heads=2,
        head_dim=8,
        context=context,
    )
