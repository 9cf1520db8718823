"""The families of models that can be served, and what follows from what a family says of itself."""

from collections.abc import Sequence
from math import prod

import jax.numpy as jnp

from pdjax.core.kv_layout import KVLayout, split_layers
from pdjax.core.messages import shown
from pdjax.core.model_spec import ModelSpec
from pdjax.core.moe_spec import MoeSpec
from pdjax.device.models.family import LayerKind, ModelFamily
from pdjax.device.models.gemma2 import Gemma2
from pdjax.device.models.gemma3 import Gemma3
from pdjax.device.models.glm import Glm
from pdjax.device.models.glm4 import Glm4
from pdjax.device.models.granite import Granite
from pdjax.device.models.llama import Llama
from pdjax.device.models.mistral import Mistral
from pdjax.device.models.mixtral import Mixtral
from pdjax.device.models.olmo2 import Olmo2
from pdjax.device.models.phi3 import Phi3
from pdjax.device.models.qwen2 import Qwen2
from pdjax.device.models.qwen2_moe import Qwen2Moe
from pdjax.device.models.qwen3 import Qwen3
from pdjax.device.models.qwen3_moe import Qwen3Moe
from pdjax.device.models.smollm3 import SmolLM3

FAMILIES: dict[str, ModelFamily] = {
    Llama.name: Llama(),
    Mistral.name: Mistral(),
    Qwen2.name: Qwen2(),
    Qwen3.name: Qwen3(),
    Olmo2.name: Olmo2(),
    Granite.name: Granite(),
    SmolLM3.name: SmolLM3(),
    Phi3.name: Phi3(),
    Glm.name: Glm(),
    Glm4.name: Glm4(),
    Gemma2.name: Gemma2(),
    Gemma3.name: Gemma3(),
    Mixtral.name: Mixtral(),
    Qwen2Moe.name: Qwen2Moe(),
    Qwen3Moe.name: Qwen3Moe(),
}
"""Families by their names. A family is one file, and one line here."""


def family_named(name: object) -> ModelFamily:
    """Return the family of a name.

    Raises:
      ValueError: there is none.
    """
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"family={shown(name)}: allowed are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of(spec: ModelSpec) -> ModelFamily:
    """Return the family that a spec names; see `family_named`."""
    return family_named(spec.family)


def slot_kinds(spec: ModelSpec, stage_layers: Sequence[Sequence[int]]) -> list[LayerKind]:
    """Return the kind of each layer slot of a mesh whose stages hold these layers. All stages run
    one program, so that the layers of a slot must be of one kind.

    Raises:
      ValueError: they are not; says with how many stages they would be.
    """
    kinds = family_of(spec).kinds(spec)
    found = _common_kinds(kinds, stage_layers)
    if found is None:
        counts = range(1, min(spec.num_layers, 64) + 1)
        allowed = [n for n in counts if _common_kinds(kinds, split_layers(spec.num_layers, n))]
        raise ValueError(
            f"stages={len(stage_layers)}: puts layers of different kinds at the same place of its "
            f"stages, which run one program; allowed: {allowed}"
        )
    return found


def _common_kinds(
    kinds: Sequence[LayerKind], stage_layers: Sequence[Sequence[int]]
) -> list[LayerKind] | None:
    found: list[LayerKind] = []
    for slot in range(max(map(len, stage_layers))):
        here = {kinds[layers[slot]] for layers in stage_layers if slot < len(layers)}
        if len(here) > 1:
            return None
        found += here
    return found


def kv_layout(
    spec: ModelSpec, page_size: int, dtype: str, stages: int = 1, tp: int = 1
) -> KVLayout:
    """Lay the KV cache of a model out on a mesh.

    Raises:
      ValueError: the mesh cannot be; see `KVLayout` and `slot_kinds`.
    """
    family = family_of(spec)
    kinds = family.kinds(spec)
    planes = {kind: family.planes(spec, kind) for kind in dict.fromkeys(kinds)}
    itemsize = jnp.dtype(dtype).itemsize
    each = tuple(planes[kind] for kind in kinds)
    layout = KVLayout(each, page_size, dtype, itemsize, stages, tp)
    slot_kinds(spec, layout.stage_layers)
    return layout


def matrix_params(spec: ModelSpec) -> int:
    """Count the weights of all layers that a token is multiplied with: their matrices, of experts
    those of the token's."""
    return _matrices(spec, spec.share_used if isinstance(spec, MoeSpec) else 1.0)


def touched_params(spec: ModelSpec, tokens: int) -> int:
    """Count the weights of all layers that a step of so many tokens must read: their matrices, of
    experts those that one of the tokens goes through, on average; see `MoeSpec.share_touched`."""
    return _matrices(spec, spec.share_touched(tokens) if isinstance(spec, MoeSpec) else 1.0)


def _matrices(spec: ModelSpec, share: float) -> int:
    """Weights of the matrices of all layers, and of a share of the experts."""
    family = family_of(spec)
    weights = {
        kind: [weight for weight in family.weights(spec, kind) if len(weight.dims.split()) > 1]
        for kind in dict.fromkeys(family.kinds(spec))
    }
    each = {
        kind: sum(
            prod(spec.shape(weight.dims)) * (share if weight.of_experts else 1)
            for weight in weights[kind]
        )
        for kind in weights
    }
    return round(sum(each[kind] for kind in family.kinds(spec)))
