"""Shapes of well-known models, for benchmarks with random weights: speed depends on the shapes, not
on the values of the weights."""

from dataclasses import replace

import jax

from pdjax.config import RANDOM, Config, ModelConfig
from pdjax.config.presets import LLAMA3_8B
from pdjax.core.model_spec import ModelSpec, RopeSpec
from pdjax.core.moe_spec import MoeSpec
from pdjax.device.compat import use_virtual_cpu_devices

MODELS = {
    "llama3_8b": LLAMA3_8B,
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
    # Qwen/Qwen3-30B-A3B
    "qwen3_30b_a3b": MoeSpec(
        vocab_size=151936,
        num_layers=48,
        model_dim=2048,
        mlp_dim=6144,
        query_heads=32,
        kv_heads=4,
        head_dim=128,
        context=40960,
        rope=RopeSpec(theta=1e6),
        norm_eps=1e-6,
        family="qwen3_moe",
        num_experts=128,
        experts_per_token=8,
        expert_mlp_dim=768,
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


LARGE = "llama3_8b"
"""The default of `--model` on an accelerator."""

SHAPES = f"shapes; unless given {LARGE}, and tiny on the CPU"
"""The help of `--model`."""


def chosen_model(given: str | None, *configs: Config) -> str:
    """Return the name that `--model` gives; else LARGE, or "tiny" on the CPU, where LARGE would run
    out of memory. A message tells of "tiny".

    Args:
      given: the value of `--model`.
      configs: configs of all engines that this process will make, with any model. JAX must start to
        tell the platform; on the CPU it starts with as many devices as the largest config needs.
    """
    use_virtual_cpu_devices(max((c.cpu_devices or c.devices for c in configs), default=1))
    if given is not None:
        return given
    if jax.default_backend() != "cpu":
        return LARGE
    print("model: tiny, since JAX runs on the CPU; --model takes others", flush=True)
    return "tiny"


def random_model(model: str, longest: int) -> ModelConfig:
    """Make a model config of random weights in these shapes, for sequences of `longest` tokens."""
    spec = MODELS[model]
    return ModelConfig(
        source=RANDOM,
        spec=replace(spec, context=max(spec.context, longest)),
        dtype="float32" if model == "tiny" else "bfloat16",
        max_model_len=longest,
    )
