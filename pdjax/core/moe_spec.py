"""MoeSpec: the architecture of a decoder whose layers have experts (mixture of experts, Shazeer et
al., 2017), as numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pdjax.core.model_spec import (
    LARGEST,
    ModelSpec,
    check_bool,
    check_integer,
    check_layers,
)

MAX_EXPERTS = 1 << 12


@dataclass(frozen=True)
class MoeSpec(ModelSpec):
    """Adds the experts, each an MLP, of which a router chooses some for each token.

    Attributes:
      num_experts: E, of a layer.
      experts_per_token: those with the highest probabilities, at most E.
      expert_mlp_dim: X, MLP dim of an expert.
      normalised: the weights of a token's experts sum to 1; if not, they are the probabilities
        among all experts.
      dense_layers: layers with an MLP of `mlp_dim` in place of experts.
      shared_mlp_dim: C, MLP dim of an expert beside them that all tokens go through; 0: there is
        none.

    Raises:
      ValueError: a number is out of range, or all layers are dense.
    """

    num_experts: int = 8
    experts_per_token: int = 2
    expert_mlp_dim: int = 14336
    normalised: bool = True
    dense_layers: tuple[int, ...] = ()
    shared_mlp_dim: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("num_experts", self.num_experts, 1, MAX_EXPERTS)
        check_integer("experts_per_token", self.experts_per_token, 1, self.num_experts)
        check_integer("expert_mlp_dim", self.expert_mlp_dim, 1, LARGEST["mlp_dim"])
        check_integer("shared_mlp_dim", self.shared_mlp_dim, 0, LARGEST["mlp_dim"])
        check_bool("normalised", self.normalised)
        check_layers("dense_layers", self.dense_layers, self.num_layers)
        if len(set(self.dense_layers)) == self.num_layers:
            raise ValueError(f"dense_layers={self.dense_layers}: some layer must have experts")

    @property
    def sizes(self) -> dict[str, int]:
        own = {"E": self.num_experts, "X": self.expert_mlp_dim, "C": self.shared_mlp_dim}
        return super().sizes | own

    @property
    def mlp_params(self) -> int:
        dense = len(set(self.dense_layers))
        shared = 3 * self.shared_mlp_dim + (self.shared_mlp_dim > 0)  # and its gate
        experts = self.num_experts * (1 + 3 * self.expert_mlp_dim)  # and the router
        sparse = (self.num_layers - dense) * (experts + shared)
        return self.model_dim * (3 * dense * self.mlp_dim + sparse)

    @property
    def share_used(self) -> float:
        """Share of a layer's experts that a token goes through."""
        return self.experts_per_token / self.num_experts

    def share_touched(self, tokens: float) -> float:
        """Share of a layer's experts that at least one of so many tokens goes through, on average,
        where each token's are as good as drawn: what a step must read of them."""
        return share_touched(self.share_used, tokens)


def share_touched(used: float, tokens: float) -> float:
    """See `MoeSpec.share_touched`; `used` is the share that one token goes through."""
    return 1 - (1 - used) ** tokens


def spec_of_sizes(sizes: Mapping[str, Any], context: int) -> ModelSpec:
    """A model of the sizes that a measurement names: its position embedding, and what its family
    adds to them, do not matter there.

    Args:
      sizes: by the fields of the spec, as JSON has them.
      context: longest sequence, tokens.

    Raises:
      ValueError: a size is missing or out of range.
    """
    kind = MoeSpec if "num_experts" in sizes else ModelSpec
    known = {field.name for field in fields(kind)} - {"rope", "context"}
    given: dict[str, Any] = {
        name: tuple(size) if isinstance(size, list) else size
        for name, size in sizes.items()
        if name in known
    }
    try:
        return kind(**given, context=context)
    except TypeError as error:
        raise ValueError(f"spec: {error}") from error
