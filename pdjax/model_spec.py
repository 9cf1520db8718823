"""ModelSpec: the architecture of a decoder, as numbers. Readers of checkpoints make it; the model
is built from it."""

import math
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding and how it is stretched beyond the trained context.

    Attributes:
      theta: base of the frequencies.
      kind: "plain", "linear", "llama3" or "yarn".
      factor: how many times the context is stretched.
      original_context: context length the model was trained with (llama3, yarn).
      low_freq_factor, high_freq_factor: llama3's band between stretched and untouched wavelengths.
      beta_fast, beta_slow: yarn's band, in rotations over the original context.
      attention_factor: yarn's scale of cos and sin; None means 0.1 ln(factor) + 1.
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

    def __post_init__(self) -> None:
        kinds = ("plain", "linear", "llama3", "yarn")
        if self.kind not in kinds:
            raise ValueError(f"rope.kind={self.kind!r}: allowed are {', '.join(kinds)}")
        if self.factor <= 0:
            raise ValueError(f"rope.factor={self.factor}: must be positive")
        if self.kind in ("llama3", "yarn") and self.original_context < 1:
            raise ValueError(
                f"rope.original_context={self.original_context}: "
                f"{self.kind} needs the trained context"
            )

    def frequencies(self, head_dim: int) -> tuple[np.ndarray, float]:
        """Radians a position for each pair of dimensions, f64[H/2], and the scale of cos and sin.

        Sources: RoPE (Su et al. 2021); "linear" position interpolation (Chen et al. 2023); "llama3"
        as published with Llama 3.1; YaRN (Peng et al. 2023).
        """
        base = self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.kind == "plain":
            return base, 1.0
        if self.kind == "linear":
            return base / self.factor, 1.0
        if self.kind == "llama3":
            rotations = self.original_context * base / (2 * math.pi)
            keep = (rotations - self.low_freq_factor) / (
                self.high_freq_factor - self.low_freq_factor
            )
            keep = np.clip(keep, 0.0, 1.0)
            return keep * base + (1 - keep) * base / self.factor, 1.0
        return self._yarn(base, head_dim)

    def _yarn(self, base: np.ndarray, head_dim: int) -> tuple[np.ndarray, float]:
        def dimension(rotations: float) -> float:
            wavelength = self.original_context / (rotations * 2 * math.pi)
            return head_dim * math.log(wavelength) / (2 * math.log(self.theta))

        low = max(math.floor(dimension(self.beta_fast)), 0)
        high = min(math.ceil(dimension(self.beta_slow)), head_dim - 1)
        stretch = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
        scale = self.attention_factor
        if scale is None:
            scale = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        return stretch * base / self.factor + (1 - stretch) * base, scale


@dataclass(frozen=True)
class ModelSpec:
    """A Llama-architecture decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU.

    Attributes:
      vocab_size: V. num_layers: L. model_dim: D. mlp_dim: F.
      query_heads: N. kv_heads: K, a divisor of N. head_dim: H, even.
      context: longest sequence in tokens, prompt and output together.
      rope: position embedding.
      norm_eps: epsilon of RMSNorm.
      tied: the output matrix is the embedding, transposed.
      qkv_bias: projections to Q, K and V have a bias (Qwen2).
      eos_token_ids: tokens that end a text.
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

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "num_layers",
            "model_dim",
            "mlp_dim",
            "query_heads",
            "kv_heads",
            "context",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.query_heads % self.kv_heads:
            raise ValueError(
                f"kv_heads={self.kv_heads}: must divide query_heads={self.query_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: RoPE needs an even number of dimensions")

    @property
    def group(self) -> int:
        """Query heads that share a KV head, G."""
        return self.query_heads // self.kv_heads

    @property
    def num_params(self) -> int:
        """Weights of the model; the tied embedding counts once."""
        d, h = self.model_dim, self.head_dim
        layer = (
            d * (self.query_heads + 2 * self.kv_heads) * h
            + self.query_heads * h * d
            + 3 * d * self.mlp_dim
            + 2 * d
        )
        layer += (self.query_heads + 2 * self.kv_heads) * h if self.qkv_bias else 0
        return self.num_layers * layer + self.vocab_size * d * (1 if self.tied else 2) + d
