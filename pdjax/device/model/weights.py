"""From a checkpoint to a mesh: every device gets its shards, and the host reads only the slices that they need.

A mesh of R stages holds R layers in each *layer slot*, one a stage: slot j of stage s is layer `stage_layers[s][j]`, or
a layer of zeros, which is the identity, where the stage is shorter. The R local arrays of a slot are one global array,
concatenated along axis 0, so that inside `shard_map` a shard looks the same whatever R is.

Dimension key: D model dim, N query heads, K KV heads, G = N/K, H head dim, F MLP dim, V vocabulary, R stages.
"""

import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from pdjax.device.mesh import Rules, sharding
from pdjax.device.model.checkpoints.api import EMBED, FINAL_NORM, UNEMBED, Checkpoint, layer_tensor
from pdjax.device.model.spec import ModelSpec
from pdjax.device.model.transformer import LAYER_AXES, MODEL_AXES, Layer, Params

StageLayers = Sequence[Sequence[int]]
Bounds = tuple[tuple[int, int], ...]
"""First and last + 1 of a slice, for each axis."""


def load_params(
    checkpoint: Checkpoint, mesh: Mesh, rules: Rules, stage_layers: StageLayers, dtype: jax.typing.DTypeLike
) -> Params:
    """The weights of `checkpoint` on `mesh`.

    Args:
      checkpoint: where the weights are.
      mesh: ("stage", "tp").
      rules: logical axis -> mesh axes, of the phase.
      stage_layers: global layer indices of each stage, in order.
      dtype: element type on the device.

    Returns:
      Params with one Layer a slot, each global array `[R * d0, ...]` for a local layer `[d0, ...]`. The vocabulary is
      padded with zeros to a multiple of its shards.

    Raises:
      ValueError: KV heads or MLP dim do not divide into the shards; or from the checkpoint.
    """
    spec = checkpoint.spec
    layout = _Layout(spec, mesh, rules, stage_layers)
    dtype = np.dtype(dtype)
    bar = tqdm(
        total=layout.num_leaves, desc="loading weights", unit="array", delay=2, disable=not sys.stderr.isatty()
    )

    def place(shape: tuple[int, ...], where: NamedSharding, read: Callable[[Bounds], np.ndarray]) -> jax.Array:
        @functools.cache  # replicas of a slice are read once
        def read_once(bounds: Bounds) -> np.ndarray:
            return np.ascontiguousarray(read(bounds), dtype=dtype)

        def callback(index: tuple[slice, ...]) -> np.ndarray:
            return read_once(tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True)))

        bar.update()
        return jax.make_array_from_callback(shape, where, callback)

    def place_layer(slot: int, name: str) -> jax.Array:
        d0 = layout.layer_shapes[name][0]

        def read(bounds: Bounds) -> np.ndarray:
            stage = bounds[0][0] // d0
            local = ((bounds[0][0] - stage * d0, bounds[0][1] - stage * d0), *bounds[1:])
            layer = layout.layer_at(slot, stage)
            if layer is None:
                return np.zeros([stop - start for start, stop in local], dtype)
            return _READERS[name](checkpoint, layer, local)

        return place(layout.stacked_shape(name), layout.layer_sharding(name), read)

    with bar:
        layers = [
            Layer(**{name: place_layer(slot, name) if layout.has(name) else None for name in layout.layer_fields})
            for slot in range(layout.slots)
        ]
        outside = {
            name: place(layout.model_shapes[name], layout.model_sharding(name), functools.partial(read, checkpoint))
            for name, read in _MODEL_READERS.items()
            if name in layout.model_shapes
        }
    return Params(layers=layers, embed=outside.pop("embed", None), **outside)


def random_params(
    spec: ModelSpec, mesh: Mesh, rules: Rules, stage_layers: StageLayers, dtype: jax.typing.DTypeLike, seed: int = 0
) -> Params:
    """Random weights of the architecture `spec`, made on the devices; see `load_params` for the arguments.

    They depend on `seed`, on the tensor and on the global layer, not on the layout. Products keep the scale of their
    input and the embeddings are small beside what layers add, so that the next token depends on the whole context.
    """
    layout = _Layout(spec, mesh, rules, stage_layers)
    root = jax.random.key(seed)
    layers = []
    for slot in range(layout.slots):
        of_stage = [layout.layer_at(slot, stage) for stage in range(layout.stages)]
        ids = np.array([-1 if layer is None else layer for layer in of_stage], np.int32)  # [R]
        arrays = {
            name: _random_layers(root, ids, name, layout.layer_shapes[name], layout.layer_sharding(name), dtype)
            for name in layout.layer_fields
            if layout.has(name)
        }
        layers.append(Layer(**{name: arrays.get(name) for name in layout.layer_fields}))
    outside = {
        name: _random_outside(root, name, spec.vocab_size, shape, layout.model_sharding(name), dtype)
        for name, shape in layout.model_shapes.items()
    }
    return Params(layers=layers, embed=outside.pop("embed", None), **outside)


class _Layout:
    """Shapes and shardings of the weights of `spec` on a mesh."""

    def __init__(self, spec: ModelSpec, mesh: Mesh, rules: Rules, stage_layers: StageLayers) -> None:
        self.stages = len(stage_layers)
        self.slots = max(len(layers) for layers in stage_layers)
        self.layer_fields = [field.name for field in fields(Layer)]
        self._mesh, self._rules, self._stage_layers, self._spec = mesh, rules, stage_layers, spec
        _check_divides("kv_heads", spec.kv_heads, self._shards("kv_heads"))
        _check_divides("mlp_dim", spec.mlp_dim, self._shards("mlp"))
        assert self._shards("stage") == self.stages, "one run of layers a stage"
        d, h, columns = spec.model_dim, spec.head_dim, spec.kv_heads * (spec.group + 2) * spec.head_dim
        self.layer_shapes: dict[str, tuple[int, ...]] = {
            "attn_norm": (d,),
            "wqkv": (d, columns),
            "bqkv": (columns,),
            "wo": (spec.query_heads * h, d),
            "mlp_norm": (d,),
            "w_gate_up": (d, 2, spec.mlp_dim),
            "w_down": (spec.mlp_dim, d),
        }
        shards = self._shards("vocab")
        vocab = -(-spec.vocab_size // shards) * shards
        self.model_shapes: dict[str, tuple[int, ...]] = {"final_norm": (d,), "unembed": (d, vocab)}
        if not spec.tied:
            self.model_shapes["embed"] = (vocab, d)

    def _shards(self, axis: str) -> int:
        return math.prod(self._mesh.shape[name] for name in self._rules[axis])

    @property
    def num_leaves(self) -> int:
        """Arrays in Params."""
        return self.slots * sum(map(self.has, self.layer_fields)) + len(self.model_shapes)

    def has(self, name: str) -> bool:
        """Does a layer of this architecture have the field?"""
        return name != "bqkv" or self._spec.qkv_bias

    def layer_at(self, slot: int, stage: int) -> int | None:
        """Global index of a layer, or None where the stage has no layer in this slot."""
        layers = self._stage_layers[stage]
        return layers[slot] if slot < len(layers) else None

    def stacked_shape(self, name: str) -> tuple[int, ...]:
        """Global shape of a layer's field, the stages concatenated along axis 0."""
        d0, *rest = self.layer_shapes[name]
        return (self.stages * d0, *rest)

    def layer_sharding(self, name: str) -> NamedSharding:
        """Sharding of a field of a layer."""
        return sharding(self._mesh, self._rules, getattr(LAYER_AXES, name), stacked=True)

    def model_sharding(self, name: str) -> NamedSharding:
        """Sharding of a weight outside the layers."""
        return sharding(self._mesh, self._rules, getattr(MODEL_AXES, name))


def _check_divides(field: str, size: int, shards: int) -> None:
    if size % shards:
        allowed = [n for n in range(1, min(size, 64) + 1) if size % n == 0]
        raise ValueError(f"tp={shards}: does not divide the model's {field}={size}; allowed: {allowed}")


# Readers: each makes the slice `bounds` of one of our weights out of slices of the checkpoint's tensors.


def _read_norm(part: str) -> Callable[[Checkpoint, int, Bounds], np.ndarray]:
    return lambda checkpoint, layer, bounds: checkpoint.read(layer_tensor(layer, part), slice(*bounds[0]))


def _read_transposed(part: str) -> Callable[[Checkpoint, int, Bounds], np.ndarray]:
    return lambda checkpoint, layer, bounds: checkpoint.read(
        layer_tensor(layer, part), slice(*bounds[1]), slice(*bounds[0])
    ).T


def _qkv_by_head(
    checkpoint: Checkpoint, layer: int, kind: str, columns: tuple[int, int], cols: slice
) -> np.ndarray:
    """Q, K and V of a run of KV heads, [columns, D] or [columns]; see `Layer.wqkv` for the order."""
    spec = checkpoint.spec
    width = (spec.group + 2) * spec.head_dim
    assert columns[0] % width == 0 and columns[1] % width == 0, "shards hold whole heads"
    first, last = columns[0] // width, columns[1] // width
    parts = []
    for projection, rows in (("q", spec.group * spec.head_dim), ("k", spec.head_dim), ("v", spec.head_dim)):
        name = layer_tensor(layer, f"self_attn.{projection}_proj.{kind}")
        part = checkpoint.read(name, slice(first * rows, last * rows), cols)
        parts.append(part.reshape(last - first, rows, *part.shape[1:]))
    heads = np.concatenate(parts, axis=1)  # [K, (G + 2) * H, ...]
    return heads.reshape(-1, *heads.shape[2:])


def _read_wqkv(checkpoint: Checkpoint, layer: int, bounds: Bounds) -> np.ndarray:
    return _qkv_by_head(checkpoint, layer, "weight", bounds[1], slice(*bounds[0])).T


def _read_bqkv(checkpoint: Checkpoint, layer: int, bounds: Bounds) -> np.ndarray:
    return _qkv_by_head(checkpoint, layer, "bias", bounds[0], slice(None))


def _read_gate_up(checkpoint: Checkpoint, layer: int, bounds: Bounds) -> np.ndarray:
    rows, cols = slice(*bounds[2]), slice(*bounds[0])
    parts = [checkpoint.read(layer_tensor(layer, f"mlp.{part}_proj.weight"), rows, cols).T for part in ("gate", "up")]
    return np.stack(parts, axis=1)[:, slice(*bounds[1])]


_READERS: dict[str, Callable[[Checkpoint, int, Bounds], np.ndarray]] = {
    "attn_norm": _read_norm("input_layernorm.weight"),
    "wqkv": _read_wqkv,
    "bqkv": _read_bqkv,
    "wo": _read_transposed("self_attn.o_proj.weight"),
    "mlp_norm": _read_norm("post_attention_layernorm.weight"),
    "w_gate_up": _read_gate_up,
    "w_down": _read_transposed("mlp.down_proj.weight"),
}


def _read_vocab_rows(checkpoint: Checkpoint, name: str, rows: tuple[int, int], cols: tuple[int, int]) -> np.ndarray:
    """Rows of a vocabulary matrix; those beyond the vocabulary are zeros."""
    size = checkpoint.spec.vocab_size
    found = checkpoint.read(name, slice(min(rows[0], size), min(rows[1], size)), slice(*cols))
    return np.pad(found, ((0, rows[1] - rows[0] - len(found)), (0, 0)))


def _read_final_norm(checkpoint: Checkpoint, bounds: Bounds) -> np.ndarray:
    return checkpoint.read(FINAL_NORM, slice(*bounds[0]))


def _read_unembed(checkpoint: Checkpoint, bounds: Bounds) -> np.ndarray:
    name = EMBED if checkpoint.spec.tied else UNEMBED
    return _read_vocab_rows(checkpoint, name, bounds[1], bounds[0]).T


def _read_embed(checkpoint: Checkpoint, bounds: Bounds) -> np.ndarray:
    return _read_vocab_rows(checkpoint, EMBED, bounds[0], bounds[1])


_MODEL_READERS: dict[str, Callable[[Checkpoint, Bounds], np.ndarray]] = {
    "final_norm": _read_final_norm,
    "unembed": _read_unembed,
    "embed": _read_embed,
}


def _random_layers(
    root: jax.Array,
    layers: np.ndarray,
    name: str,
    shape: tuple[int, ...],
    where: NamedSharding,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Field `name` of `layers` i32[R] (-1: zeros), concatenated along axis 0."""
    return _draw_layers(name, shape, where, np.dtype(dtype))(root, layers)


@functools.lru_cache(maxsize=64)  # one program a field serves every slot
def _draw_layers(name: str, shape: tuple[int, ...], where: NamedSharding, dtype: np.dtype) -> Callable[..., jax.Array]:
    def draw(root: jax.Array, layers: jax.Array) -> jax.Array:
        def one(layer: jax.Array) -> jax.Array:
            return jnp.where(layer >= 0, _draw(jax.random.fold_in(root, layer), name, shape), 0).astype(dtype)

        return jax.vmap(one)(layers).reshape(-1, *shape[1:])  # [R * d0, ...]

    return jax.jit(draw, out_shardings=where)


def _random_outside(
    root: jax.Array,
    name: str,
    vocab_size: int,
    shape: tuple[int, ...],
    where: NamedSharding,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    def draw(key: jax.Array) -> jax.Array:
        real = tuple(vocab_size if axes == "vocab" else size for axes, size in zip(axes_of, shape, strict=True))
        values = _draw(jax.random.fold_in(key, 2**31 - 1), name, real).astype(dtype)
        return jnp.pad(values, [(0, size - filled) for size, filled in zip(shape, real, strict=True)])

    axes_of = getattr(MODEL_AXES, name)
    return jax.jit(draw, out_shardings=where)(root)


def _draw(key: jax.Array, name: str, shape: tuple[int, ...]) -> jax.Array:
    """float32 values of one weight, by its name."""
    if name.endswith("norm"):
        return jnp.ones(shape, jnp.float32)
    names: Iterator[str] = iter((*_READERS, *_MODEL_READERS))
    key = jax.random.fold_in(key, list(names).index(name))
    scale = {"bqkv": 0.5, "embed": shape[-1] ** -0.5}.get(name, shape[0] ** -0.5)
    return scale * jax.random.normal(key, shape, jnp.float32)
