"""ModelSpec: the architecture of a decoder, as numbers. Readers of checkpoints make it; the model
is built from it."""

import math
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np

from pdjax.core.messages import shown

_I32 = 2**31 - 1
LARGEST = {
    "vocab_size": _I32,
    "num_layers": 4096,
    "model_dim": 1 << 24,
    "mlp_dim": 1 << 24,
    "query_heads": 1 << 16,
    "kv_heads": 1 << 16,
    "head_dim": 1 << 12,
    "context": _I32,
}
"""Largest value of each size: far above every model, and small enough that arithmetic on it ends.
Positions and token ids are 32-bit integers on the devices."""

MAX_NUMBER, MIN_NUMBER = 1e30, 1e-30
"""Largest and smallest number that a field takes; their reciprocals are 32-bit floats."""


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding and how it is stretched beyond the trained context.

    Attributes:
      theta: base of the frequencies.
      kind: "plain", "linear", "llama3", "yarn", "longrope", or "none", which rotates nothing
        (layers without a position embedding).
      factor: how many times the context is stretched.
      original_context: context length the model was trained with (llama3, yarn, longrope).
      low_freq_factor, high_freq_factor: llama3's band between stretched and untouched wavelengths.
      beta_fast, beta_slow: yarn's band, in rotations over the original context.
      attention_factor: scale of cos and sin (yarn, longrope); None means 0.1 ln(factor) + 1 for
        yarn and sqrt(1 + ln(factor) / ln(original_context)) for longrope.
      truncate: yarn's band begins and ends at whole dimensions.
      rotary_dim: dimensions of a head that are rotated, the first ones; None: all. The others keep
        their places behind.
      divisors: of the frequencies, one for each pair of dimensions (longrope).
      short_divisors: those of a model that serves no more than its original context; see `within`.

    Raises:
      ValueError: a field has the wrong type, is not finite, or makes no frequencies.
    """

    theta: float = 10000.0
    kind: str = "plain"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    rotary_dim: int | None = None
    divisors: tuple[float, ...] = ()
    short_divisors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        kinds = ("plain", "linear", "llama3", "yarn", "longrope", "none")
        if self.kind not in kinds:
            raise ValueError(f"rope.kind={shown(self.kind)}: allowed are {', '.join(kinds)}")
        for name in _POSITIVE_NUMBERS:
            check_positive(f"rope.{name}", getattr(self, name))
        if self.attention_factor is not None:
            check_positive("rope.attention_factor", self.attention_factor)
        check_integer("rope.original_context", self.original_context, 0, _I32)
        check_bool("rope.truncate", self.truncate)
        if self.rotary_dim is not None:
            check_integer("rope.rotary_dim", self.rotary_dim, 2, LARGEST["head_dim"])
        for name in ("divisors", "short_divisors"):
            for divisor in getattr(self, name):
                check_positive(f"rope.{name}", divisor)
        if self.kind in ("llama3", "yarn", "longrope") and self.original_context < 1:
            raise ValueError(
                f"rope.original_context={self.original_context}: "
                f"{self.kind} needs the trained context"
            )
        if self.kind == "yarn" and self.theta == 1:
            raise ValueError("rope.theta=1: yarn needs another base than 1")

    def within(self, context: int) -> "RopeSpec":
        """Return the embedding of a model that serves sequences of at most `context` tokens.

        LongRoPE has two sets of divisors. transformers chooses by the length that a sequence has at
        a step, so that K of one sequence come to be rotated in two ways. One set for all of a
        deployment keeps tokens independent of chunks, prefixes and preemption.
        """
        if self.kind == "longrope" and context <= self.original_context:
            return replace(self, divisors=self.short_divisors)
        return self

    def frequencies(self, head_dim: int) -> tuple[np.ndarray, float]:
        """Radians a position for each pair of dimensions that is rotated, f64[H/2] or
        f64[rotary_dim/2], and the scale of cos and sin.

        Sources: RoPE (Su et al. 2021); "linear" position interpolation (Chen et al. 2023); "llama3"
        as published with Llama 3.1; YaRN (Peng et al. 2023); LongRoPE (Ding et al. 2024).

        Raises:
          ValueError: `rotary_dim` or the divisors do not fit a head.
        """
        if self.kind == "none":
            return np.zeros(head_dim // 2), 1.0
        if self.rotary_dim is not None:
            if self.rotary_dim > head_dim or self.rotary_dim % 2:
                raise ValueError(
                    f"rope.rotary_dim={self.rotary_dim}: must be even, and at most "
                    f"head_dim={head_dim}"
                )
            head_dim = self.rotary_dim
        base = self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.kind == "plain":
            return base, 1.0
        if self.kind == "linear":
            return base / self.factor, 1.0
        if self.kind == "llama3":
            return self._llama3(base), 1.0
        if self.kind == "longrope":
            return self._longrope(base)
        return self._yarn(base, head_dim)

    def _longrope(self, base: np.ndarray) -> tuple[np.ndarray, float]:
        for name in ("divisors", "short_divisors"):
            if len(getattr(self, name)) != len(base):
                raise ValueError(
                    f"rope.{name}: {len(getattr(self, name))} numbers; longrope needs {len(base)}, "
                    "one for each pair of dimensions that is rotated"
                )
        scale = self.attention_factor
        if scale is None:
            log = math.log(max(self.factor, 1.0)) / math.log(max(self.original_context, 2))
            scale = math.sqrt(1 + log)
        return base / np.asarray(self.divisors), scale

    def _llama3(self, base: np.ndarray) -> np.ndarray:
        rotations = self.original_context * base / (2 * math.pi)
        band = self.high_freq_factor - self.low_freq_factor
        if band > 0:
            keep = np.clip((rotations - self.low_freq_factor) / band, 0.0, 1.0)
        else:  # no band: a wave is either untouched or stretched
            keep = (rotations >= self.low_freq_factor).astype(np.float64)
        return keep * base + (1 - keep) * base / self.factor

    def _yarn(self, base: np.ndarray, head_dim: int) -> tuple[np.ndarray, float]:
        def dimension(rotations: float) -> float:
            wavelength = self.original_context / (rotations * 2 * math.pi)
            return head_dim * math.log(wavelength) / (2 * math.log(self.theta))

        first, last = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        low, high = max(first, 0), min(last, head_dim - 1)
        # A band that ends before it begins is read backwards, as transformers reads it.
        band = high - low if high != low else 0.001
        stretch = np.clip((np.arange(head_dim // 2) - low) / band, 0.0, 1.0)
        scale = self.attention_factor
        if scale is None:
            scale = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        return stretch * base / self.factor + (1 - stretch) * base, scale


_POSITIVE_NUMBERS = (
    "theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
)


def check_positive(name: str, value: object) -> None:
    """Refuse anything but a positive number with a reciprocal in 32 bits."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)}: must be a positive number")
    if not MIN_NUMBER <= value <= MAX_NUMBER:  # also False for a NaN
        raise ValueError(
            f"{name}={shown(value)}: must be positive, {MIN_NUMBER:g} to {MAX_NUMBER:g}"
        )


def check_integer(name: str, value: object, least: int, most: int) -> None:
    """Refuse anything but an integer from `least` to `most`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)}: must be an integer")
    if not least <= value <= most:
        raise ValueError(f"{name}={shown(value)}: must be at least {least} and at most {most}")


def check_layers(name: str, layers: object, count: int) -> None:
    """Refuse anything but a tuple of the indices of some of `count` layers."""
    if not isinstance(layers, tuple):
        raise ValueError(f"{name}={shown(layers)}: must be indices of layers")
    for layer in layers:
        check_integer(name, layer, 0, count - 1)


def check_bool(name: str, value: object) -> None:
    """Refuse anything but true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)}: must be true or false")


@dataclass(frozen=True)
class ModelSpec:
    """A decoder, in numbers. What they mean is for its family to say.

    Attributes:
      vocab_size: V. num_layers: L. model_dim: D. mlp_dim: F.
      query_heads: N. kv_heads: K, a divisor of N. head_dim: H, even.
      context: longest sequence in tokens, prompt and output together.
      rope: position embedding.
      norm_eps: epsilon of RMSNorm.
      tied: the output matrix is the embedding, transposed.
      qkv_bias: projections to Q, K and V have a bias (Qwen2).
      eos_token_ids: tokens that end a text.
      family: name of the family of models; see `device/models/registry.py`.
      window: newest tokens that a token sees in some layers, itself included; None: all, as where
        no sequence is longer than the window.
      window_layers: those layers.
    """

    vocab_size: int
    num_layers: int
    model_dim: int
    mlp_dim: int
    query_heads: int
    kv_heads: int
    head_dim: int
    context: int
    rope: RopeSpec = field(default_factory=RopeSpec)
    norm_eps: float = 1e-5
    tied: bool = False
    qkv_bias: bool = False
    eos_token_ids: tuple[int, ...] = ()
    family: str = "llama"
    window: int | None = None
    window_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, most in LARGEST.items():
            check_integer(name, getattr(self, name), 1, most)
        check_positive("norm_eps", self.norm_eps)
        check_bool("tied", self.tied)
        check_bool("qkv_bias", self.qkv_bias)
        if not isinstance(self.family, str):
            raise ValueError(f"family={shown(self.family)}: must be the name of one")
        if not isinstance(self.eos_token_ids, tuple):
            raise ValueError(f"eos_token_ids={shown(self.eos_token_ids)}: must be token ids")
        for token in self.eos_token_ids:
            check_integer("eos_token_ids", token, 0, _I32)
        if self.window is not None:
            check_integer("window", self.window, 1, _I32)
        check_layers("window_layers", self.window_layers, self.num_layers)
        if self.query_heads % self.kv_heads:
            raise ValueError(
                f"kv_heads={self.kv_heads}: must divide query_heads={self.query_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: RoPE needs an even number of dimensions")
        self._check_rope()

    def _check_rope(self) -> None:
        """Refuse frequencies that the devices cannot compute with, in 32 bits."""
        if not isinstance(self.rope, RopeSpec):
            raise ValueError(f"rope={shown(self.rope)}: must be a RopeSpec")
        with np.errstate(all="ignore"):
            frequencies, scale = self.rope.frequencies(self.head_dim)
            angles = np.float32(frequencies * self.context)
        if not (np.isfinite(angles).all() and np.isfinite(np.float32(scale))):
            raise ValueError(f"rope={self.rope}: its frequencies are not finite 32-bit numbers")

    def within(self, context: int) -> Self:
        """Return the spec of a model that serves sequences of at most `context` tokens; see
        `RopeSpec.within`."""
        return replace(self, rope=self.rope.within(context))

    @property
    def group(self) -> int:
        """Query heads that share a KV head, G."""
        return self.query_heads // self.kv_heads

    @property
    def mlp_params(self) -> int:
        """Weights of the MLPs of all layers."""
        return self.num_layers * 3 * self.model_dim * self.mlp_dim

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by the letters of the dimension key; J = G + 2 rows of a KV head: its queries', K
        and V."""
        return {
            "V": self.vocab_size,
            "D": self.model_dim,
            "F": self.mlp_dim,
            "N": self.query_heads,
            "K": self.kv_heads,
            "G": self.group,
            "J": self.group + 2,
            "H": self.head_dim,
        }

    def shape(self, dims: str) -> tuple[int, ...]:
        """Shape of what is written in letters, axes apart by spaces: "D 2 KJH" is [D, 2, K * J *
        H], and "2X" is 2 * X."""
        sizes = {**self.sizes, "2": 2}
        return tuple(
            int(axis) if axis.isdecimal() else math.prod(sizes[letter] for letter in axis)
            for axis in dims.split()
        )
