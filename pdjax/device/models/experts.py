"""Layers whose MLP is a mixture of experts (Shazeer et al., 2017): a router chooses a few MLPs for
each token, whose results are added by its weights.

The choice is a token's alone. No expert has a capacity, so that no token is dropped (MegaBlocks,
Gale et al., 2022), and what a token's experts return is added in the order of their weights: the
result depends on no other token.

Experts are sharded as the rules of the mesh say: each over all shards, or dealt out to them. All
shards hold all tokens and route them alike. One that holds some of the experts computes the tokens
of those, and the sum over the shards, which partial products need anyway, brings them together; no
token has to be sent.

Dimension key: T tokens, U experts of a token, M = T * U rows, E experts (of a shard), D model dim,
X MLP dim of an expert, C MLP dim of the shared expert.
"""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.add_rms.api import add_rms
from pallas_kernels.grouped_product.api import grouped_product
from pallas_kernels.product.api import product
from pallas_kernels.swiglu.api import swiglu
from pdjax.core.model_spec import ModelSpec
from pdjax.core.moe_spec import MoeSpec
from pdjax.device.checkpoints.gguf_keys import ArchKeys
from pdjax.device.mesh import TP
from pdjax.device.models.family import Layer, LayerKind, Noise, Reduce, Tensor, Weight
from pdjax.device.models.forms import EXPERTS, EXPERTS_STACKED, STACKED, TRANSPOSED
from pdjax.device.models.llama import Llama


def moe(spec: ModelSpec) -> MoeSpec:
    """Return the spec, which is a MoeSpec."""
    assert isinstance(spec, MoeSpec), f"a MoeSpec, not {type(spec).__name__}"
    return spec


class Experts(Llama):
    """A base of families; see `ModelFamily`.

    Attributes:
      folder: of the MLP's tensors as transformers 4 names them.
      parts: names of an expert's matrices there: gate, up and down.
    """

    experts = True
    gguf_keys: frozenset[str] = frozenset(
        ["expert_count", "expert_used_count", "expert_feed_forward_length"]
    )
    spec_type: type[ModelSpec] = MoeSpec
    folder = "mlp"
    parts = ("gate_proj", "up_proj", "down_proj")

    def gguf_spec(self, spec: ModelSpec, keys: ArchKeys) -> ModelSpec:
        """The weights of a token's experts sum to 1, as llama.cpp has it whatever the model."""
        return MoeSpec(
            **vars(super().gguf_spec(spec, keys)),
            num_experts=keys.integer("expert_count", 0),
            experts_per_token=keys.integer("expert_used_count", 0),
            expert_mlp_dim=keys.integer("expert_feed_forward_length", spec.mlp_dim),
        )

    def kind(self, spec: ModelSpec, layer: int) -> LayerKind:
        kind = super().kind(spec, layer)
        return replace(kind, experts=layer not in moe(spec).dense_layers)

    def mlp_weights(self, spec: ModelSpec, kind: LayerKind) -> Sequence[Weight]:
        """`w_experts_up` holds gate, then up."""
        if not kind.experts:
            return super().mlp_weights(spec, kind)
        gate, up, down = (f"{self.folder}.experts.{{}}.{part}.weight" for part in self.parts)
        router = Tensor("mlp.gate.weight", "ffn_gate_inp.weight", "E D")
        gate_up = Tensor(
            *("mlp.experts.gate_up_proj", "", "E 2X D"),
            of_expert=(gate, up),
            gguf_parts=("ffn_gate_exps.weight", "ffn_up_exps.weight"),
        )
        downs = Tensor(
            *("mlp.experts.down_proj", "ffn_down_exps.weight", "E D X"), of_expert=(down,)
        )
        if self.folder != "mlp":
            router = replace(router, old=f"{self.folder}.gate.weight")
        up_axes, down_axes = ("experts", None, None, "expert_mlp"), ("experts", "expert_mlp", None)
        norm, noise = self.pre_norms[1], Noise(13, fan_in=1)
        weights = [
            Weight("router", "D E", (None, None), (router,), TRANSPOSED, Noise(12, gain=3.0), norm),
            Weight("w_experts_up", "E D 2 X", up_axes, (gate_up,), EXPERTS_STACKED, noise, norm),
            Weight("w_experts_down", "E X D", down_axes, (downs,), EXPERTS, Noise(14, fan_in=1)),
        ]
        return [*weights, *self._shared_weights()] if moe(spec).shared_mlp_dim else weights

    def _shared_weights(self) -> Sequence[Weight]:
        """Those of the expert that all tokens go through, and of its gate."""
        gate, up, down = (
            Tensor(f"mlp.shared_expert.{part}_proj.weight", f"ffn_{part}_shexp.weight", dims)
            for part, dims in (("gate", "C D"), ("up", "C D"), ("down", "D C"))
        )
        weight = Tensor("mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight", "1 D")
        axes, norm = (None, None, "shared_mlp"), self.pre_norms[1]
        return [
            Weight("w_shared_up", "D 2 C", axes, (gate, up), STACKED, Noise(15), norm),
            Weight("w_shared_down", "C D", ("shared_mlp", None), (down,), TRANSPOSED, Noise(16)),
            Weight("shared_gate", "D 1", (None, None), (weight,), TRANSPOSED, Noise(17), norm),
        ]

    def mlp(
        self,
        layer: Layer,
        x: jax.Array,
        scale: jax.Array,
        spec: ModelSpec,
        kind: LayerKind,
        reduce: Reduce | None,
        live: jax.Array | None,
        *,
        alone: bool,
    ) -> tuple[jax.Array, jax.Array]:
        if not kind.experts:
            return super().mlp(layer, x, scale, spec, kind, reduce, live, alone=alone)
        chosen, shares = route(x, scale, layer["router"], moe(spec))
        y = through_experts(layer, x, scale, chosen, shares, moe(spec), live)
        if moe(spec).shared_mlp_dim:
            y += _through_shared(layer, x, scale)
        y = y.astype(x.dtype)
        return add_rms(x, y if reduce is None else reduce(y), eps=spec.norm_eps)


def route(
    x: jax.Array, scale: jax.Array, router: jax.Array, spec: MoeSpec
) -> tuple[jax.Array, jax.Array]:
    """Choose the experts of tokens.

    Args:
      x: [T, D]. scale: f32[T], of RMSNorm for it.
      router: [D, E], of all experts.

    Returns:
      i32[T, U], those with the highest probabilities, the first of equal ones; and f32[T, U], what
      each counts.
    """
    logits = _float32(x, router) * scale[:, None]
    probabilities = jax.nn.softmax(logits, axis=-1)
    shares, chosen = lax.top_k(probabilities, spec.experts_per_token)
    if spec.normalised:
        shares /= shares.sum(axis=-1, keepdims=True)
    return chosen, shares


def through_experts(
    layer: Layer,
    x: jax.Array,
    scale: jax.Array,
    chosen: jax.Array,
    shares: jax.Array,
    spec: MoeSpec,
    live: jax.Array | None,
) -> jax.Array:
    """Return f32[T, D], what the experts of this shard, or its part of all of them, return to each
    token, by its shares [T, U] of those chosen [T, U]. Tokens that are not live have no expert."""
    (tokens, used), local = chosen.shape, len(layer["w_experts_up"])
    if local < spec.num_experts:
        chosen -= lax.axis_index(TP) * local
    mine = (chosen >= 0) & (chosen < local)
    if live is not None:
        mine &= live[:, None]
    experts = jnp.where(mine, chosen, local).reshape(-1)  # [M]; the others come last
    order = jnp.argsort(experts, stable=True)
    sizes = jnp.bincount(experts, length=local + 1)[:local].astype(jnp.int32)
    rows = order // used
    w_up = layer["w_experts_up"].reshape(local, x.shape[1], -1)
    gate_up = grouped_product(x[rows], w_up, sizes).astype(jnp.float32)  # [M, 2X]
    gate, up = jnp.split(gate_up * scale[rows, None], 2, axis=1)
    hidden = (jax.nn.silu(gate) * up).astype(x.dtype)
    made = grouped_product(hidden, layer["w_experts_down"], sizes)  # [M, D]
    back = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)), unique_indices=True)
    each = made[back].reshape(tokens, used, -1).astype(jnp.float32)
    return jnp.where(mine[:, :, None], shares[:, :, None] * each, 0).sum(axis=1)


def _through_shared(layer: Layer, x: jax.Array, scale: jax.Array) -> jax.Array:
    """What the shared expert, or this shard's part of it, returns to each token, f32[T, D]."""
    hidden = swiglu(x, scale, layer["w_shared_up"])
    gate = jax.nn.sigmoid(_float32(x, layer["shared_gate"]) * scale[:, None])  # [T, 1]
    return gate * product(hidden, layer["w_shared_down"]).astype(jnp.float32)


def _float32(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w in float32, whatever their type: what is chosen by it should not hang on rounding."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot(x, w, precision=precision, preferred_element_type=jnp.float32)
