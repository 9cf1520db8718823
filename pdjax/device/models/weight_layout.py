"""Shapes and shardings of a model's weights on a mesh.

A mesh of R stages holds R layers in each *layer slot*, one a stage: slot j of stage s is layer
`stage_layers[s][j]`, or a layer of zeros, which is the identity, where the stage is shorter. The R
local arrays of a slot are one global array, concatenated along axis 0, so that inside `shard_map` a
shard looks the same whatever R is.
"""

import math
from collections.abc import Sequence

from jax.sharding import AbstractMesh, Mesh, NamedSharding

from pdjax.core.model_spec import ModelSpec
from pdjax.device.mesh import TP, Rules, sharding
from pdjax.device.models.family import Weight
from pdjax.device.models.registry import family_of, slot_kinds

StageLayers = Sequence[Sequence[int]]


class WeightLayout:
    """Where the weights of `spec` lie on `mesh` under `rules`; it may have no devices.

    Attributes:
      stages: R. slots: layer slots of a stage.
      layer_weights: weights of each layer slot.
      outside: weights outside the layers.

    Raises:
      ValueError: what a weight is cut along does not divide into the shards, see `check_shards`; or
        the layers of a slot are of different kinds.
    """

    def __init__(
        self,
        spec: ModelSpec,
        mesh: Mesh | AbstractMesh,
        rules: Rules,
        stage_layers: StageLayers,
    ) -> None:
        self.stages = len(stage_layers)
        self.slots = max(len(layers) for layers in stage_layers)
        self._mesh, self._rules, self._stage_layers = mesh, rules, stage_layers
        assert self._shards("stage") == self.stages, "one run of layers a stage"
        check_shards(spec, rules, mesh.shape[TP])
        self._spec, family = spec, family_of(spec)
        kinds = slot_kinds(spec, stage_layers)
        weights = {kind: tuple(family.weights(spec, kind)) for kind in dict.fromkeys(kinds)}
        self.layer_weights = [weights[kind] for kind in kinds]
        self.outside = family.outside(spec)

    def layer_at(self, slot: int, stage: int) -> int | None:
        """Global index of a layer, or None where the stage has no layer in this slot."""
        layers = self._stage_layers[stage]
        return layers[slot] if slot < len(layers) else None

    def shape(self, weight: Weight) -> tuple[int, ...]:
        """Shape of a weight: of one layer, or of one outside the layers. The vocabulary is padded
        to a multiple of its shards."""
        sizes = zip(self._spec.shape(weight.dims), weight.axes, strict=True)
        return tuple(self._padded(size) if axis == "vocab" else size for size, axis in sizes)

    def stacked_shape(self, weight: Weight) -> tuple[int, ...]:
        """Global shape of a layer's weight, the stages concatenated along axis 0."""
        d0, *rest = self.shape(weight)
        return (self.stages * d0, *rest)

    def sharding(self, weight: Weight, *, stacked: bool) -> NamedSharding:
        """Sharding of a weight; `stacked` if it is a layer's, of which the stages are concatenated
        along axis 0."""
        return sharding(self._mesh, self._rules, weight.axes, stacked=stacked)

    def _padded(self, size: int) -> int:
        shards = self._shards("vocab")
        return math.ceil(size / shards) * shards

    def _shards(self, axis: str) -> int:
        return math.prod(self._mesh.shape[name] for name in self._rules[axis])


_FIELDS = {
    "kv_heads": "kv_heads",
    "mlp": "mlp_dim",
    "experts": "num_experts",
    "expert_mlp": "expert_mlp_dim",
    "shared_mlp": "shared_mlp_dim",
}
"""Field of a spec that an axis of weights is cut along; the vocabulary is padded instead."""


def check_shards(spec: ModelSpec, rules: Rules, tp: int) -> None:
    """Refuse shards that would cut a head or an expert in two, or cut unequally.

    Raises:
      ValueError: `tp` does not divide what a weight of the model is cut along; says what would.
    """
    family = family_of(spec)
    of_kind = (family.weights(spec, kind) for kind in dict.fromkeys(family.kinds(spec)))
    axes = dict.fromkeys(axis for weights in of_kind for weight in weights for axis in weight.axes)
    for field in (_FIELDS[axis] for axis in axes if axis is not None and TP in rules[axis]):
        size = getattr(spec, field)
        if size % tp:
            allowed = [n for n in range(1, min(size, 64) + 1) if size % n == 0]
            raise ValueError(
                f"tp={tp}: does not divide the model's {field}={size}; allowed: {allowed}"
            )
