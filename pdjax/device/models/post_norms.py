"""Layers that norm what attention and the MLP return before they add it to the residual stream:
sandwiched between two norms, or without the norm before."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.add_rms.api import add_rms
from pallas_kernels.product.api import product
from pallas_kernels.swiglu.api import swiglu
from pdjax.core.model_spec import ModelSpec
from pdjax.device.models.family import Attend, Layer, LayerKind, Reduce, Tensor, Weight
from pdjax.device.models.forms import PLAIN
from pdjax.device.models.llama import Llama
from pdjax.device.models.norms import rms_norm


class PostNorms(Llama):
    """A base of families; see `ModelFamily`.

    Attributes:
      post_norms: the norms after attention and after the MLP.
      activation: of the MLP, by `swiglu`'s name.
    """

    post_norms: tuple[Tensor, Tensor]
    activation = "silu"

    def weights(self, spec: ModelSpec, kind: LayerKind) -> Sequence[Weight]:
        named = zip(("attention_norm", "mlp_norm"), self.post_norms, strict=True)
        norms = [Weight(name, "D", (None,), (norm,), PLAIN, noise=None) for name, norm in named]
        return [*super().weights(spec, kind), *norms]

    def block(
        self,
        layer: Layer,
        x: jax.Array,
        scale: jax.Array,
        cache: Any,
        attend: Attend,
        *,
        spec: ModelSpec,
        kind: LayerKind,
        reduce: Reduce | None,
        live: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array, Any]:
        heads = (x.shape[0], -1, spec.group + 2, spec.head_dim)  # [T, K, J, H], K of this shard

        def before(norm: Tensor | None, scale: jax.Array) -> jax.Array:
            return jnp.ones_like(scale) if norm is None else scale

        def add(
            x: jax.Array, y: jax.Array, w: jax.Array, norm: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            """x + the norm of y @ w of all shards, and its scale."""
            y = product(y, w) if reduce is None else reduce(product(y, w))
            return add_rms(x, rms_norm(y, norm, spec.norm_eps).astype(x.dtype), eps=spec.norm_eps)

        scale = before(self.pre_norms[0], scale)
        qkv = product(x, layer["wqkv"]).reshape(heads)
        o, cache = attend(*self.heads(layer, qkv, scale, spec, reduce), cache, kind)  # [T, N, H]
        x, scale = add(x, o.reshape(x.shape[0], -1), layer["wo"], layer["attention_norm"])
        scale = before(self.pre_norms[1], scale)
        hidden = swiglu(x, scale, layer["w_gate_up"], activation=self.activation)
        x, scale = add(x, hidden, layer["w_down"], layer["mlp_norm"])
        return x, scale, cache
