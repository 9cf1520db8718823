"""What it takes to compute the KV of tokens again."""

from dataclasses import dataclass

from pdjax.core.model_spec import ModelSpec


@dataclass(frozen=True)
class RecomputeCost:
    """FLOPs of prefilling a token: its products with weights, and its attention, which grows with
    the tokens before it.

    Attributes:
      token: FLOPs of a token without attention.
      position: FLOPs of its attention to each token before it.

    Raises:
      ValueError: one is not positive or zero.
    """

    token: float
    position: float

    def __post_init__(self) -> None:
        for name in ("token", "position"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"recompute.{name}={value}: must be FLOPs, 0 or more")

    @classmethod
    def of(cls, spec: ModelSpec, matrix_params: int) -> "RecomputeCost":
        """That of a model whose queries attend to all tokens before them. A multiply-add counts as
        two FLOPs.

        Args:
          spec: its shapes.
          matrix_params: weights that each token is multiplied with.
        """
        heads = spec.query_heads * spec.head_dim
        return cls(2.0 * matrix_params, 4.0 * spec.num_layers * heads)

    def flops(self, start: int, stop: int) -> float:
        """FLOPs of the tokens `[start, stop)` of a sequence whose first `start` have their KV."""
        before = (start + stop - 1) / 2  # of a token, on average
        return (stop - start) * (self.token + self.position * before)
