"""From a checkpoint to a mesh: every device gets its shards, and the host reads only the slices
that they need. Or from a seed, where numbers are all that matters.

Dimension key: D model dim, N query heads, K KV heads, G = N/K, H head dim, F MLP dim, V vocabulary,
R stages.
"""

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from pdjax.core.model_spec import ModelSpec
from pdjax.device.checkpoints.api import EMBED, FINAL_NORM, UNEMBED, Checkpoint, layer_tensor
from pdjax.device.mesh import Rules
from pdjax.device.models.llama import MODEL_AXES, Layer, Params
from pdjax.device.models.weight_layout import StageLayers, WeightLayout

Bounds = tuple[tuple[int, int], ...]
"""First and last + 1 of a slice, for each axis."""


def load_params(
    checkpoint: Checkpoint,
    mesh: Mesh,
    rules: Rules,
    stage_layers: StageLayers,
    dtype: jax.typing.DTypeLike,
) -> Params:
    """The weights of `checkpoint` on `mesh`.

    Args:
      checkpoint: where the weights are.
      mesh: ("stage", "tp").
      rules: logical axis -> mesh axes, of the phase.
      stage_layers: global layer indices of each stage, in order.
      dtype: element type on the device.

    Returns:
      Params with one Layer a slot, each global array `[R * d0, ...]` for a local layer `[d0, ...]`.
      The vocabulary is padded with zeros to a multiple of its shards.

    Raises:
      ValueError: KV heads or MLP dim do not divide into the shards; or from the checkpoint.
    """
    layout = WeightLayout(checkpoint.spec, mesh, rules, stage_layers)
    dtype = np.dtype(dtype)
    read_norm = functools.cache(checkpoint.read)  # every shard of a layer asks for it
    head = (checkpoint.spec.group + 2) * checkpoint.spec.head_dim  # columns of a KV head
    total = layout.slots * len(layout.layer_shapes) + len(layout.model_shapes)
    hidden = not sys.stderr.isatty()
    with tqdm(total=total, desc="loading weights", unit="array", delay=2, disable=hidden) as bar:

        def place(
            name: str,
            shape: tuple[int, ...],
            where: NamedSharding,
            read: Callable[[Bounds], np.ndarray],
        ) -> jax.Array:
            bar.update()
            unit = head if name in _BY_HEAD else 1
            return _place(
                shape, where, functools.partial(_fill, read, _BLOCK_AXES[name], unit, dtype)
            )

        layers = []
        for slot in range(layout.slots):
            arrays: dict[str, Any] = {"bqkv": None}
            for name in layout.layer_shapes:
                read = functools.partial(_read_stacked, checkpoint, read_norm, layout, slot, name)
                shape, where = layout.stacked_shape(name), layout.layer_sharding(name)
                arrays[name] = place(name, shape, where, read)
            layers.append(Layer(**arrays))
        outside: dict[str, Any] = {"embed": None}
        for name, shape in layout.model_shapes.items():
            read = functools.partial(_MODEL_READERS[name], checkpoint)
            outside[name] = place(name, shape, layout.model_sharding(name), read)
    return Params(layers=layers, **outside)


def _place(
    shape: tuple[int, ...], where: NamedSharding, read: Callable[[Bounds], np.ndarray]
) -> jax.Array:
    """An array whose shards are `read`, each slice once however many devices hold it."""
    read_once = functools.cache(read)

    def callback(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None, "a sharding over devices asks for slices"
        sized = zip(index, shape, strict=True)
        return read_once(tuple(part.indices(size)[:2] for part, size in sized))

    return jax.make_array_from_callback(shape, where, callback)


BLOCK_BYTES = 8 << 20
"""Bytes of a slice, in 32 bits, that is read at once: what loading takes beside the array that it
fills."""

_BLOCK_AXES = {
    "wqkv": 1,
    "bqkv": 0,
    "wo": 1,
    "w_gate_up": 2,
    "w_down": 1,
    "final_norm": 0,
    "unembed": 1,
    "embed": 0,
}
"""The axis along which an array is filled: that of the rows of the checkpoint's tensors, which are
contiguous there."""

_BY_HEAD = ("wqkv", "bqkv")
"""Arrays of which only whole KV heads, with their query heads, can be read."""


def _fill(
    read: Callable[[Bounds], np.ndarray], axis: int, unit: int, dtype: np.dtype, bounds: Bounds
) -> np.ndarray:
    """The slice `bounds`, read in blocks of a multiple of `unit` along `axis`.

    A checkpoint's element type may be wider than `dtype`, and a reader transposes and scales what
    it reads; so a few blocks are in memory beside the slice, and not a few slices.
    """
    values = np.empty([stop - start for start, stop in bounds], dtype)
    first, last = bounds[axis]
    width = 4 * values.size // max(last - first, 1)
    step = unit * max(1, BLOCK_BYTES // max(width * unit, 1))
    for start in range(first, last, step):
        stop = min(start + step, last)
        part = (slice(None),) * axis + (slice(start - first, stop - first),)
        values[part] = read((*bounds[:axis], (start, stop), *bounds[axis + 1 :]))
    return values


def random_params(
    spec: ModelSpec,
    mesh: Mesh,
    rules: Rules,
    stage_layers: StageLayers,
    dtype: jax.typing.DTypeLike,
    seed: int = 0,
) -> Params:
    """Random weights of the architecture `spec`, made on the devices; see `load_params`.

    They depend on `seed`, on the tensor and on the global layer, not on the layout. Attention is
    sharp and the embeddings are small beside what layers add, so that the next token depends on the
    whole context and greedy text does not freeze into one token.
    """
    layout = WeightLayout(spec, mesh, rules, stage_layers)

    def draw_slot(layers: jax.Array) -> dict[str, jax.Array]:
        """layers u32[R]: the layer of each stage, L for none -> arrays [R * d0, ...]."""

        def draw(name: str, layer: jax.Array) -> jax.Array:
            values = _draw(seed, layer, name, layout.layer_shapes[name])
            return jnp.where(layer < spec.num_layers, values, 0).astype(dtype)

        stacked = {name: jax.vmap(functools.partial(draw, name))(layers) for name in in_layer}
        return {name: x.reshape(layout.stacked_shape(name)) for name, x in stacked.items()}

    def draw_outside() -> dict[str, jax.Array]:
        arrays = {}
        for name, padded in layout.model_shapes.items():
            axes = getattr(MODEL_AXES, name)
            sizes = zip(axes, padded, strict=True)
            shape = tuple(spec.vocab_size if axis == "vocab" else size for axis, size in sizes)
            values = _draw(seed, spec.num_layers, name, shape).astype(dtype)
            padding = zip(padded, shape, strict=True)
            arrays[name] = jnp.pad(values, [(0, size - filled) for size, filled in padding])
        return arrays

    in_layer = {name: layout.layer_sharding(name) for name in layout.layer_shapes}
    outside = {name: layout.model_sharding(name) for name in layout.model_shapes}
    make_slot = jax.jit(draw_slot, out_shardings=in_layer)
    slots = []
    for slot in range(layout.slots):
        found = [layout.layer_at(slot, stage) for stage in range(layout.stages)]
        ids = np.array([spec.num_layers if i is None else i for i in found], np.uint32)
        slots.append(Layer(**({"bqkv": None} | make_slot(ids))))
    arrays = jax.jit(draw_outside, out_shardings=outside)()
    return Params(layers=slots, **({"embed": None} | arrays))


_STREAMS = {"wqkv": 1, "bqkv": 2, "wo": 3, "w_gate_up": 5, "w_down": 6, "unembed": 8, "embed": 9}
"""Tells the weights' noise apart. Another number makes another model of every seed."""


def _draw(seed: int, layer: jax.Array | int, name: str, shape: tuple[int, ...]) -> jax.Array:
    """float32 values of one weight: uniform noise, a hash of where an element stands.

    Integer arithmetic gives the same bits however the array is sharded, and compiles in a fraction
    of the time of `jax.random`.
    """
    if name == "final_norm":
        return jnp.ones(shape, jnp.float32)
    key = _hash(_hash(np.uint32(seed)) + np.uint32(_STREAMS[name]))
    key = _hash(key + jnp.uint32(layer))
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * np.uint32(size) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    uniform = (_hash(_hash(place) + key) >> 8).astype(jnp.float32) * 2.0**-23 - 1.0  # [-1, 1)
    fan_in = shape[-1] if name == "embed" else shape[0]
    deviation = {"bqkv": 0.5, "wqkv": 3.0 * fan_in**-0.5}.get(name, fan_in**-0.5)
    return math.sqrt(3.0) * deviation * uniform


def _hash(x: jax.Array | np.uint32) -> jax.Array:
    """Mix the bits of uint32 (the finaliser of MurmurHash3)."""
    x = jnp.asarray(x)
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


# Readers: each makes the slice `bounds` of one of our weights out of slices of the checkpoint's
# tensors.


def _read_stacked(
    checkpoint: Checkpoint,
    read_norm: Callable[[str], np.ndarray],
    layout: WeightLayout,
    slot: int,
    name: str,
    bounds: Bounds,
) -> np.ndarray:
    """A slice, within one stage, of a field of a slot; zeros where the stage has no layer."""
    d0 = layout.layer_shapes[name][0]
    stage = bounds[0][0] // d0
    local = ((bounds[0][0] - stage * d0, bounds[0][1] - stage * d0), *bounds[1:])
    layer = layout.layer_at(slot, stage)
    if layer is None:
        return np.zeros([stop - start for start, stop in local], np.float32)
    weight = _LAYER_READERS[name](checkpoint, layer, local)
    if name not in _FOLDED_NORMS:
        return weight
    norm = read_norm(layer_tensor(layer, _FOLDED_NORMS[name]))[slice(*local[0])]  # [D]
    norm = norm.astype(np.float32).reshape(-1, *(1,) * (weight.ndim - 1))
    return weight.astype(np.float32) * norm


def _read_transposed(part: str) -> Callable[[Checkpoint, int, Bounds], np.ndarray]:
    return lambda checkpoint, layer, bounds: (
        checkpoint.read(layer_tensor(layer, part), slice(*bounds[1]), slice(*bounds[0])).T
    )


def _qkv_by_head(
    checkpoint: Checkpoint, layer: int, kind: str, columns: tuple[int, int], cols: slice
) -> np.ndarray:
    """Q, K and V of a run of KV heads, [columns, D] or [columns]; order: see `Layer.wqkv`."""
    spec = checkpoint.spec
    width = (spec.group + 2) * spec.head_dim
    assert columns[0] % width == 0 and columns[1] % width == 0, "shards hold whole heads"
    first, last = columns[0] // width, columns[1] // width
    parts = []
    for projection, rows in (
        ("q", spec.group * spec.head_dim),
        ("k", spec.head_dim),
        ("v", spec.head_dim),
    ):
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
    parts = [
        checkpoint.read(layer_tensor(layer, f"mlp.{part}_proj.weight"), rows, cols).T
        for part in ("gate", "up")
    ]
    return np.stack(parts, axis=1)[:, slice(*bounds[1])]


_LAYER_READERS: dict[str, Callable[[Checkpoint, int, Bounds], np.ndarray]] = {
    "wqkv": _read_wqkv,
    "bqkv": _read_bqkv,
    "wo": _read_transposed("self_attn.o_proj.weight"),
    "w_gate_up": _read_gate_up,
    "w_down": _read_transposed("mlp.down_proj.weight"),
}

_FOLDED_NORMS = {
    "wqkv": "input_layernorm.weight",
    "w_gate_up": "post_attention_layernorm.weight",
}
"""The norm before a product, whose weight is multiplied into the rows of the matrix; see
`transformer.forward`."""


def _read_vocab_rows(
    checkpoint: Checkpoint, name: str, rows: tuple[int, int], cols: tuple[int, int]
) -> np.ndarray:
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
