"""Defines what a family of models declares: a file a family, and a line in `registry.py`.

The weights that a family declares are the one table of them. The pytree of a layer, its shardings,
what is read from a checkpoint of which format, random values and counts all follow from it.

Dimension key: D model dim, N query heads, K KV heads, G = N/K, J = G + 2, H head dim, F MLP dim, V
vocabulary, T tokens, E experts, X MLP dim of an expert.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import jax

from pdjax.core.kv_layout import Planes
from pdjax.core.model_spec import ModelSpec, RopeSpec
from pdjax.device.checkpoints.gguf_keys import ArchKeys
from pdjax.device.checkpoints.hf_fields import Fields
from pdjax.device.models.forms import Form

Leaf = Any
"""An array, or what stands for one in a tree of the same shape: its sharding, its shape."""

Layer = dict[str, Leaf]
"""Weights of one layer by their names: a plain pytree."""

Reduce = Callable[[jax.Array], jax.Array]
"""Sums partial products over the shards of tensor parallelism."""


@dataclass(frozen=True)
class Tensor:
    """A tensor as checkpoints keep it, [out, in] or, of all experts, [expert, out, in]; or a run of
    rows of one.

    Attributes:
      name: Hugging Face's, which `pdjax convert` keeps; of a layer, what follows the layer's index.
      gguf: llama.cpp's; of a layer, what follows the block's index.
      dims: letters of its axes, see `ModelSpec.shape`.
      interleaved: in a GGUF file the two rows of a head that RoPE rotates together are neighbours,
        instead of half a head apart.
      order: which row of a head, as a checkpoint keeps it, each row on the devices is; see
        `forms.rotary_order`. Empty: the rows keep their order.
      less_one: a Hugging Face file holds the values less 1, and a GGUF file as they are.
      fused: letters of the rows of all tensors that a checkpoint keeps as one under this name, in
        their order; empty: it keeps this one alone.
      place: of this one among those.
      old: the name that transformers 4 has for it; empty: the same.
      of_expert: the names that transformers 4 has for the parts of one expert's matrix, `{}` being
        its number; empty: files keep all experts as one tensor.
      gguf_parts: the tensors, each of all experts, that hold those parts in GGUF files; empty: they
        keep one, `gguf`.
    """

    name: str
    gguf: str
    dims: str
    interleaved: bool = False
    order: tuple[int, ...] = ()
    less_one: bool = False
    fused: tuple[str, ...] = ()
    place: int = 0
    old: str = ""
    of_expert: tuple[str, ...] = ()
    gguf_parts: tuple[str, ...] = ()

    def rows(self, spec: ModelSpec) -> int:
        """Rows that it has, those of all its matrices; of a vector, its numbers."""
        shape = spec.shape(self.dims)
        return prod(shape[:-1]) if len(shape) > 1 else shape[0]

    def first_row(self, spec: ModelSpec) -> int:
        """Where its rows begin in what the checkpoint keeps."""
        return sum(spec.shape(rows)[0] for rows in self.fused[: self.place])

    def stored_shape(self, spec: ModelSpec) -> tuple[int, ...]:
        """Shape of what the checkpoint keeps under its name."""
        rows, *cols = spec.shape(self.dims)
        return (sum(spec.shape(each)[0] for each in self.fused) or rows, *cols)


EMBED = Tensor("model.embed_tokens.weight", "token_embd.weight", "V D")
FINAL_NORM = Tensor("model.norm.weight", "output_norm.weight", "D")
UNEMBED = Tensor("lm_head.weight", "output.weight", "V D")
"""The tensors outside the layers. A tied model has no UNEMBED."""


@dataclass(frozen=True)
class Noise:
    """Random values of a weight: uniform noise of deviation `gain / sqrt(size of axis fan_in)`, or
    of deviation `gain` if `fan_in` is None. `stream` tells the weights of a model apart; another
    number makes another model of every seed."""

    stream: int
    gain: float = 1.0
    fan_in: int | None = 0


@dataclass(frozen=True)
class Weight:
    """A weight as devices keep it.

    Attributes:
      name: in a `Layer`, or in `Params` if it is outside the layers.
      dims: letters of its axes, see `ModelSpec.shape`; of a layer's, axis 0 is what stages stack.
      axes: logical axes; `device/mesh.py` says on which mesh axes each lies in which phase.
      tensors: what it is made of.
      form: how.
      noise: its values in a model of random weights; None makes ones.
      norm: of the norm before its product, whose weight is multiplied in along the axis of its
        letter.
      factor: multiplied into what a checkpoint holds, not into random values.
    """

    name: str
    dims: str
    axes: tuple[str | None, ...]
    tensors: tuple[Tensor, ...]
    form: Form
    noise: Noise | None
    norm: Tensor | None = None
    factor: float = 1.0

    @property
    def of_experts(self) -> bool:
        """Whether it holds one matrix an expert, of which a token is multiplied with a few."""
        return self.axes[0] == "experts"


@dataclass(frozen=True)
class LayerKind:
    """What layers that share a program have in common, beside what the spec says of all.

    Attributes:
      rope: position embedding.
      window: newest tokens that a token sees, itself included; None: all.
      scale: of the products of Q and K; None: H ** -0.5.
      soft_cap: scores of attention become cap * tanh(score / cap); None: they stay.
      experts: whether the MLP is one of experts.
    """

    rope: RopeSpec
    window: int | None = None
    scale: float | None = None
    soft_cap: float | None = None
    experts: bool = False

    def attention(self, head_dim: int) -> dict[str, Any]:
        """Options of both operations of attention, by their names."""
        return {
            "scale": head_dim**-0.5 if self.scale is None else self.scale,
            "logit_soft_cap": self.soft_cap,
            "sliding_window": self.window,
        }


@dataclass(frozen=True)
class Around:
    """What the network computes around its layers, beside the products with the weights there.

    Attributes:
      embed_scale: multiplies embeddings, rounded to their type.
      logit_soft_cap: logits become cap * tanh(logit / cap); None: they stay.
    """

    embed_scale: float = 1.0
    logit_soft_cap: float | None = None


class Attend(Protocol):
    """Attends to the cache that holds the KV of a layer: writes K and V, and returns what the
    queries read and the cache's successor."""

    def __call__(
        self,
        qkv: jax.Array,
        scale: jax.Array,
        bias: jax.Array | None,
        cache: Any,
        kind: LayerKind,
    ) -> tuple[jax.Array, Any]:
        """Map qkv [T, K, J, H] of the heads of this shard, which is still to be scaled by f32[T],
        shifted by [K, J, H] and rotated, to [T, N, H]."""
        ...


class ModelFamily(Protocol):
    """Models that differ in numbers only.

    Attributes:
      name: of `ModelSpec.family`, and of `model_type` in a `config.json`.
      gguf: of `general.architecture` in GGUF files that are read as this family; None: none are.
      experts: whether layers have experts. Of GGUF files of one architecture those that name
        experts are read by such a family.
      gguf_keys: of such files, without the architecture's name, that the family reads or computes
        with and Llama does not.
      spec_type: of the specs, if a family has numbers of its own; their values are JSON's, tuples
        of them, and RopeSpecs.
    """

    name: str
    gguf: str | None
    experts: bool
    gguf_keys: frozenset[str]
    spec_type: type[ModelSpec]

    def spec(self, config: Fields) -> ModelSpec:
        """Read the architecture that a `config.json` describes, but for its end tokens.

        Raises:
          ValueError: naming the field that is missing, malformed or not supported.
        """
        ...

    def gguf_spec(self, spec: ModelSpec, keys: ArchKeys) -> ModelSpec:
        """Complete what a GGUF file says as every architecture does by what its own keys say.

        Raises:
          ValueError: naming a key whose value is not supported.
        """
        ...

    def kinds(self, spec: ModelSpec) -> Sequence[LayerKind]:
        """Return the kind of each layer; layers of one kind share a program."""
        ...

    def weights(self, spec: ModelSpec, kind: LayerKind) -> Sequence[Weight]:
        """Declare the weights of a layer. A layer of zeros must be the identity: a stage with fewer
        layers than others pads with such."""
        ...

    def planes(self, spec: ModelSpec, kind: LayerKind) -> Planes:
        """Declare what a layer keeps of a token. Kernels read K and V of equal heads, `k_and_v`."""
        ...

    def outside(self, spec: ModelSpec) -> Sequence[Weight]:
        """Declare the weights outside the layers: `final_norm`, `unembed` and, unless it is tied,
        `embed`."""
        ...

    def around(self, spec: ModelSpec) -> Around:
        """Return what is computed around the layers."""
        ...

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
        """Compute one layer over packed tokens.

        Args:
          layer: local shards.
          x: [T, D] residual stream.
          scale: f32[T] of RMSNorm for x.
          cache: what holds the KV of the layer.
          attend: attention over it.
          reduce: None where there is one shard.
          live: bool[T], whether each is a token; the others pad, and what becomes of them does not
            matter. None: all are.

        Returns:
          the residual stream after the layer, its scale, and the successor of `cache`.
        """
        ...
