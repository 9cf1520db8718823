"""What the metadata of a GGUF file and its tensor of factors say of RoPE."""

import math

import numpy as np

from pdjax.core.model_spec import RopeSpec
from pdjax.formats.gguf_metadata import Metadata

ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the frequencies, f32[H/2]: how llama.cpp's converter stores Llama 3's scaling."""

LONG_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")
"""LongRoPE's two sets of divisors, f32[H/2] or f32[rotated dimensions / 2]."""


def longrope_spec(
    meta: Metadata, arch: str, context: int, long: np.ndarray, short: np.ndarray
) -> RopeSpec:
    """The position embedding of a file with the tensors LONG_FACTORS.

    Raises:
      ValueError: a key has a value that is not supported.
    """
    prefix = f"{arch}.rope.scaling"
    original = meta.integer(f"{prefix}.original_context_length", 0) or context
    theta = meta.number(f"{arch}.rope.freq_base", 10000.0)
    scale = meta.number(f"{prefix}.attn_factor", 1.0)
    for key, value in ((f"{arch}.rope.freq_base", theta), (f"{prefix}.attn_factor", scale)):
        if value <= 0:
            raise meta.refuse(key, "a number above 0", value)
    kind = meta.text(f"{prefix}.type", "longrope")
    if kind not in ("longrope", "none"):
        raise meta.refuse(f"{prefix}.type", f"longrope beside the tensor {LONG_FACTORS[0]}", kind)
    return RopeSpec(
        theta=theta,
        kind="longrope",
        factor=max(context / original, 1.0),
        original_context=original,
        attention_factor=scale,
        divisors=_shortest(long),
        short_divisors=_shortest(short),
    )


def _shortest(factors: np.ndarray) -> tuple[float, ...]:
    """The numbers, as they were before they were rounded to 32 bits."""
    return tuple(float(str(np.float32(factor))) for factor in factors)


def rope_spec(
    meta: Metadata, arch: str, head_dim: int, context: int, factors: np.ndarray | None
) -> RopeSpec:
    """The position embedding that the keys `arch`.rope and `factors`, if any, describe.

    Defaults are those of llama.cpp: scaling is linear if no type is named, by 1 if no factor is,
    and a model whose original context is not named was trained with its context.

    Raises:
      ValueError: a key has a value that is not supported, or contradicts another.
    """
    theta = meta.number(f"{arch}.rope.freq_base", 10000.0)
    if theta <= 0:
        raise meta.refuse(f"{arch}.rope.freq_base", "a number above 0", theta)
    kind = meta.text(f"{arch}.rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise meta.refuse(f"{arch}.rope.scaling.type", "none, linear, yarn", kind)
    factor = _factor(meta, arch) if kind != "none" else 1.0
    if factors is not None:
        if factor != 1.0 or kind == "yarn":
            raise meta.refuse(
                f"{arch}.rope.scaling.type", f"none beside the tensor {ROPE_FACTORS}", kind
            )
        return _llama3(meta, theta, head_dim, factors)
    if kind == "yarn":
        return _yarn(meta, arch, theta, factor, context)
    stretch = meta.number(f"{arch}.rope.scaling.attn_factor", 1.0)
    if stretch != 1.0:
        raise meta.refuse(f"{arch}.rope.scaling.attn_factor", "1 unless the type is yarn", stretch)
    return RopeSpec(theta=theta) if factor == 1.0 else RopeSpec(theta, "linear", factor)


def _factor(meta: Metadata, arch: str) -> float:
    key = f"{arch}.rope.scaling.factor"
    if meta.get(key) is None:
        key = f"{arch}.rope.scale_linear"  # its old name
    factor = meta.number(key, 1.0)
    if factor < 0:
        raise meta.refuse(key, "a number above 0, or 0 for none", factor)
    return factor or 1.0


def _yarn(meta: Metadata, arch: str, theta: float, factor: float, context: int) -> RopeSpec:
    prefix = f"{arch}.rope.scaling"
    if theta <= 1:
        raise meta.refuse(f"{arch}.rope.freq_base", "a number above 1 with yarn", theta)
    original = meta.integer(f"{prefix}.original_context_length", 0) or context
    betas = {}
    for name, default in (("yarn_beta_fast", 32.0), ("yarn_beta_slow", 1.0)):
        betas[name] = meta.number(f"{prefix}.{name}", default)
        if betas[name] <= 0:
            raise meta.refuse(f"{prefix}.{name}", "a number above 0", betas[name])
    extrapolated = meta.number(f"{prefix}.yarn_ext_factor", 1.0)
    if extrapolated != 1.0 and extrapolated >= 0:  # a negative number stands for none
        raise meta.refuse(f"{prefix}.yarn_ext_factor", "1", extrapolated)
    # The converter writes the attention_factor of config.json, which is the scale itself, under
    # this name. llama.cpp computes the scale from the factor whatever it says.
    scale = meta.number(f"{prefix}.yarn_attn_factor", 0.1 * math.log(max(factor, 1.0)) + 1.0)
    scale *= meta.number(f"{prefix}.attn_factor", 1.0)
    if scale <= 0:
        raise meta.refuse(f"{prefix}.yarn_attn_factor", "a number above 0", scale)
    return RopeSpec(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_context=original,
        beta_fast=betas["yarn_beta_fast"],
        beta_slow=betas["yarn_beta_slow"],
        attention_factor=scale,
    )


def _llama3(meta: Metadata, theta: float, head_dim: int, factors: np.ndarray) -> RopeSpec:
    """The parameters of Llama 3's scaling that make `factors`: the largest is the factor, and the
    original context is a power of two.
    """
    plain, _ = RopeSpec(theta=theta).frequencies(head_dim)
    if factors.shape == plain.shape and np.all(np.isfinite(factors)) and np.all(factors >= 1):
        if np.all(factors == 1):
            return RopeSpec(theta=theta)
        for context in (8192, *(1 << bits for bits in range(4, 25))):
            rope = RopeSpec(theta, "llama3", float(factors.max()), context)
            made, _ = rope.frequencies(head_dim)
            if np.allclose(plain / made, factors, rtol=1e-3):
                return rope
    raise ValueError(
        f"model={str(meta.path)!r}: tensor {ROPE_FACTORS} is not the scaling of Llama 3; "
        "allowed: its factors for an original context that is a power of two, or no such tensor"
    )
