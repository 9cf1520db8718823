"""Shapes of well-known models, for benchmarks with random weights: speed depends on the shapes, not
on what the weights have learned."""

from pdjax.model_spec import ModelSpec, RopeSpec

MODELS = {
    # meta-llama/Meta-Llama-3-8B
    "llama3_8b": ModelSpec(
        vocab_size=128256,
        num_layers=32,
        model_dim=4096,
        mlp_dim=14336,
        query_heads=32,
        kv_heads=8,
        head_dim=128,
        context=8192,
        rope=RopeSpec(theta=500000.0),
    ),
    # Qwen/Qwen3-8B, without its norms of queries and keys, which pdjax does not compute
    "qwen3_8b": ModelSpec(
        vocab_size=151936,
        num_layers=36,
        model_dim=4096,
        mlp_dim=12288,
        query_heads=32,
        kv_heads=8,
        head_dim=128,
        context=40960,
        rope=RopeSpec(theta=1e6),
        norm_eps=1e-6,
    ),
    # meta-llama/Llama-3.2-1B
    "llama_1b": ModelSpec(
        vocab_size=128256,
        num_layers=16,
        model_dim=2048,
        mlp_dim=8192,
        query_heads=32,
        kv_heads=8,
        head_dim=64,
        context=131072,
        rope=RopeSpec(theta=500000.0, kind="llama3", factor=32.0, original_context=8192),
        tied=True,
    ),
    # small enough that a CPU compiles and runs it in seconds
    "tiny": ModelSpec(
        vocab_size=512,
        num_layers=3,
        model_dim=64,
        mlp_dim=128,
        query_heads=4,
        kv_heads=2,
        head_dim=16,
        context=512,
    ),
}
"""Model specs by the name that benchmarks take as `--model`."""
