"""Shapes and shardings of a model's weights on a mesh, whoever fills them.

A mesh of R stages holds R layers in each *layer slot*, one a stage: slot j of stage s is layer
`stage_layers[s][j]`, or a layer of zeros, which is the identity, where the stage is shorter. The R
local arrays of a slot are one global array, concatenated along axis 0, so that inside `shard_map` a
shard looks the same whatever R is.
"""

import math
from collections.abc import Sequence

from jax.sharding import Mesh, NamedSharding

from pdjax.core.model_spec import ModelSpec
from pdjax.device.mesh import Rules, sharding
from pdjax.device.models.llama import LAYER_AXES, MODEL_AXES

StageLayers = Sequence[Sequence[int]]


class WeightLayout:
    """Where the weights of `spec` lie on `mesh` under `rules`.

    Attributes:
      stages: R. slots: layer slots of a stage.
      layer_shapes: logical shape of each field that a layer has, by its name in `Layer`.
      model_shapes: shape of each weight outside the layers, by its name in `Params`; the vocabulary
        is padded to a multiple of its shards.

    Raises:
      ValueError: the KV heads or the MLP do not divide into the shards; says what would.
    """

    def __init__(
        self, spec: ModelSpec, mesh: Mesh, rules: Rules, stage_layers: StageLayers
    ) -> None:
        self.stages = len(stage_layers)
        self.slots = max(len(layers) for layers in stage_layers)
        self._mesh, self._rules, self._stage_layers = mesh, rules, stage_layers
        assert self._shards("stage") == self.stages, "one run of layers a stage"
        _check_divides("kv_heads", spec.kv_heads, self._shards("kv_heads"))
        _check_divides("mlp_dim", spec.mlp_dim, self._shards("mlp"))
        d, h, f = spec.model_dim, spec.head_dim, spec.mlp_dim
        columns = spec.kv_heads * (spec.group + 2) * h
        self.layer_shapes: dict[str, tuple[int, ...]] = {
            "wqkv": (d, columns),
            "wo": (spec.query_heads * h, d),
            "w_gate_up": (d, 2, f),
            "w_down": (f, d),
        }
        if spec.qkv_bias:
            self.layer_shapes["bqkv"] = (columns,)
        vocab = math.ceil(spec.vocab_size / self._shards("vocab")) * self._shards("vocab")
        self.model_shapes: dict[str, tuple[int, ...]] = {"final_norm": (d,), "unembed": (d, vocab)}
        if not spec.tied:
            self.model_shapes["embed"] = (vocab, d)

    def layer_at(self, slot: int, stage: int) -> int | None:
        """Global index of a layer, or None where the stage has no layer in this slot."""
        layers = self._stage_layers[stage]
        return layers[slot] if slot < len(layers) else None

    def stacked_shape(self, name: str) -> tuple[int, ...]:
        """Global shape of a layer's field, the stages concatenated along axis 0."""
        d0, *rest = self.layer_shapes[name]
        return (self.stages * d0, *rest)

    def layer_sharding(self, name: str) -> NamedSharding:
        """Sharding of a layer's field."""
        return sharding(self._mesh, self._rules, getattr(LAYER_AXES, name), stacked=True)

    def model_sharding(self, name: str) -> NamedSharding:
        """Sharding of a weight outside the layers."""
        return sharding(self._mesh, self._rules, getattr(MODEL_AXES, name))

    def _shards(self, axis: str) -> int:
        return math.prod(self._mesh.shape[name] for name in self._rules[axis])


def _check_divides(field: str, size: int, shards: int) -> None:
    if size % shards:
        allowed = [n for n in range(1, min(size, 64) + 1) if size % n == 0]
        raise ValueError(
            f"tp={shards}: does not divide the model's {field}={size}; allowed: {allowed}"
        )
