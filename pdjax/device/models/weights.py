"""Puts the weights of a model on a mesh. They are read from a checkpoint, of which the host reads
only the slices that its devices need; or they are random, for runs whose text does not matter.

Dimension key: D model dim, R stages.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding

from pdjax.core.model_spec import ModelSpec
from pdjax.core.progress import Progress
from pdjax.device.checkpoints.api import Checkpoint, layer_tensor
from pdjax.device.mesh import Rules
from pdjax.device.models.decoder import Params
from pdjax.device.models.family import ModelFamily, Noise, Tensor, Weight
from pdjax.device.models.forms import Bounds
from pdjax.device.models.registry import family_of
from pdjax.device.models.weight_layout import StageLayers, WeightLayout
from pdjax.device.sharing import shared


def load_params(
    checkpoint: Checkpoint,
    mesh: Mesh,
    rules: Rules,
    stage_layers: StageLayers,
    dtype: jax.typing.DTypeLike,
    progress: Progress | None = None,
) -> Params:
    """The weights of `checkpoint` on `mesh`.

    Args:
      checkpoint: where the weights are.
      mesh: ("stage", "tp").
      rules: logical axis -> mesh axes, of the phase.
      stage_layers: global layer indices of each stage, in order.
      dtype: element type on the device.
      progress: is told; None tells nobody.

    Returns:
      Params with one layer a slot, each global array `[R * d0, ...]` for a local layer `[d0, ...]`.
      The vocabulary is padded with zeros to a multiple of its shards.

    Raises:
      ValueError: KV heads or MLP dim do not divide into the shards; or from the checkpoint.
    """
    layout = WeightLayout(checkpoint.spec, mesh, rules, stage_layers)
    reader = _Reader(checkpoint, layout)
    dtype = np.dtype(dtype)
    total = sum(len(weights) for weights in layout.layer_weights) + len(layout.outside)
    with (progress or Progress(False)).phase("reading weights", total, "arrays") as advance:

        def place(weight: Weight, slot: int | None = None) -> jax.Array:
            advance(1)
            stacked = slot is not None
            shape = layout.stacked_shape(weight) if stacked else layout.shape(weight)
            read = functools.partial(reader.read, weight, slot)
            form, unit = weight.form, reader.unit(weight)
            fill = functools.partial(_fill, read, form.axis, unit, dtype, inner=form.inner)
            return _place(shape, layout.sharding(weight, stacked=stacked), fill)

        layers = [
            {weight.name: place(weight, slot) for weight in weights}
            for slot, weights in enumerate(layout.layer_weights)
        ]
        outside: dict[str, Any] = {"embed": None}
        outside |= {weight.name: place(weight) for weight in layout.outside}
    return Params(layers=layers, **outside)


def copied_params(
    params: Params, spec: ModelSpec, mesh: Mesh, rules: Rules, stage_layers: StageLayers
) -> Params:
    """The weights of another mesh on `mesh`, from device to device; see `load_params`. The shards
    of both must be the same."""
    layout = WeightLayout(spec, mesh, rules, stage_layers)
    layers = [
        {weight.name: layout.sharding(weight, stacked=True) for weight in weights}
        for weights in layout.layer_weights
    ]
    outside = {weight.name: layout.sharding(weight, stacked=False) for weight in layout.outside}
    where = Params(layers=layers, **({"embed": None} | outside))
    return jax.device_put(params, where)


def _place(
    shape: tuple[int, ...], where: NamedSharding, read: Callable[[Bounds], np.ndarray]
) -> jax.Array:
    """Make an array out of slices that `read` returns; a slice that several devices hold is read
    once."""
    read_once = functools.cache(read)

    def callback(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None, "a sharding over devices asks for slices"
        sized = zip(index, shape, strict=True)
        return read_once(tuple(part.indices(size)[:2] for part, size in sized))

    return jax.make_array_from_callback(shape, where, callback)


BLOCK_BYTES = 8 << 20
"""Bytes of a slice, in 32 bits, that is read at once: what loading takes beside the array that it
fills."""


def _fill(
    read: Callable[[Bounds], np.ndarray],
    axis: int,
    unit: int,
    dtype: np.dtype,
    bounds: Bounds,
    *,
    inner: int | None = None,
) -> np.ndarray:
    """The slice `bounds`, read in blocks of a multiple of `unit` along `axis`; where one unit is
    larger than a block, and there is an axis `inner`, in blocks along that one.

    A checkpoint's element type may be wider than `dtype`, and a reader transposes and scales what
    it reads; so a few blocks are in memory beside the slice, and not a few slices.
    """
    values = np.empty([stop - start for start, stop in bounds], dtype)
    first, last = bounds[axis]
    width = 4 * values.size // max(last - first, 1)
    step = unit * max(1, BLOCK_BYTES // max(width * unit, 1))
    if inner is not None and width * unit > BLOCK_BYTES:
        read = functools.partial(_fill, read, inner, 1, dtype)
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
    stages = tuple(map(tuple, stage_layers))
    family, sorted_rules = family_of(spec), tuple(sorted(rules.items()))
    slot_maker, outside = _drawing(spec, family, mesh, sorted_rules, stages, np.dtype(dtype), seed)
    slots = []
    for slot, weights in enumerate(layout.layer_weights):
        found = [layout.layer_at(slot, stage) for stage in range(layout.stages)]
        ids = np.array([spec.num_layers if i is None else i for i in found], np.uint32)
        slots.append(slot_maker(weights)(ids))
    return Params(layers=slots, **({"embed": None} | outside()))


@shared
def _drawing(
    spec: ModelSpec,
    family: ModelFamily,  # that the spec names now
    mesh: Mesh,
    rules: tuple[tuple[str, tuple[str, ...]], ...],
    stage_layers: StageLayers,
    dtype: np.dtype,
    seed: int,
) -> tuple[
    Callable[[tuple[Weight, ...]], Callable[[np.ndarray], dict[str, jax.Array]]],
    Callable[[], dict[str, jax.Array]],
]:
    """What makes the program that draws the weights of a slot, and the program that draws those
    outside the layers."""
    layout = WeightLayout(spec, mesh, dict(rules), stage_layers)

    @functools.cache  # slots whose layers are alike share a program
    def slot_maker(weights: tuple[Weight, ...]) -> Callable[[np.ndarray], dict[str, jax.Array]]:
        """(u32[R], the layer of each stage, L for none) -> arrays [R * d0, ...]."""

        def draw(weight: Weight, layer: jax.Array) -> jax.Array:
            values = _draw(seed, layer, weight.noise, layout.shape(weight))
            return jnp.where(layer < spec.num_layers, values, 0).astype(dtype)

        def draw_slot(layers: jax.Array) -> dict[str, jax.Array]:
            stacked = {w: jax.vmap(functools.partial(draw, w))(layers) for w in weights}
            return {w.name: x.reshape(layout.stacked_shape(w)) for w, x in stacked.items()}

        return jax.jit(
            draw_slot, out_shardings={w.name: layout.sharding(w, stacked=True) for w in weights}
        )

    def draw_outside() -> dict[str, jax.Array]:
        arrays = {}
        for weight in layout.outside:
            shape, padded = spec.shape(weight.dims), layout.shape(weight)
            values = _draw(seed, spec.num_layers, weight.noise, shape).astype(dtype)
            padding = zip(padded, shape, strict=True)
            arrays[weight.name] = jnp.pad(values, [(0, size - filled) for size, filled in padding])
        return arrays

    where = {weight.name: layout.sharding(weight, stacked=False) for weight in layout.outside}
    return slot_maker, jax.jit(draw_outside, out_shardings=where)


def _draw(
    seed: int, layer: jax.Array | int, noise: Noise | None, shape: tuple[int, ...]
) -> jax.Array:
    """float32 values of one weight, a hash of where an element stands.

    Integer arithmetic gives the same bits however the array is sharded, and compiles in a fraction
    of the time of `jax.random`.
    """
    if noise is None:
        return jnp.ones(shape, jnp.float32)
    key = _hash(_hash(np.uint32(seed)) + np.uint32(noise.stream))
    key = _hash(key + jnp.uint32(layer))
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * np.uint32(size) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    uniform = (_hash(_hash(place) + key) >> 8).astype(jnp.float32) * 2.0**-23 - 1.0  # [-1, 1)
    deviation = noise.gain * (1.0 if noise.fan_in is None else shape[noise.fan_in] ** -0.5)
    return math.sqrt(3.0) * deviation * uniform


def _hash(x: jax.Array | np.uint32) -> jax.Array:
    """Mix the bits of uint32 (the finaliser of MurmurHash3)."""
    x = jnp.asarray(x)
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _whole(tensor: Tensor, found: np.ndarray) -> np.ndarray:
    """Values that a checkpoint may hold less 1."""
    return found.astype(np.float32) + 1 if tensor.less_one else found


def _ordered(tensor: Tensor, found: np.ndarray) -> np.ndarray:
    """Rows of whole heads, in the order in which the devices keep them."""
    if not tensor.order:
        return found
    heads = found.reshape(-1, len(tensor.order), *found.shape[1:])
    return heads[:, list(tensor.order)].reshape(found.shape)


class _Reader:
    """Reads slices of weights out of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, layout: WeightLayout) -> None:
        self._checkpoint, self._spec, self._layout = checkpoint, checkpoint.spec, layout
        self._norm = functools.cache(checkpoint.read)  # every shard of a layer asks for it

    def unit(self, weight: Weight) -> int:
        """Elements along the axis of the form that must be read together."""
        form, shape = weight.form, self._spec.shape(weight.dims)
        return 1 if form.unit is None else shape[form.axis] // self._spec.sizes[form.unit]

    def read(self, weight: Weight, slot: int | None, bounds: Bounds) -> np.ndarray:
        """A slice of a weight outside the layers, or, within one stage, of a layer slot; zeros
        where the stage has no layer."""
        if slot is None:
            return self._times(weight.factor, self._form(weight, lambda name: name, bounds))
        d0 = self._layout.shape(weight)[0]
        stage = bounds[0][0] // d0
        local = ((bounds[0][0] - stage * d0, bounds[0][1] - stage * d0), *bounds[1:])
        layer = self._layout.layer_at(slot, stage)
        if layer is None:
            return np.zeros([stop - start for start, stop in local], np.float32)
        values = self._form(weight, functools.partial(layer_tensor, layer), local)
        if weight.norm is not None:
            axis = weight.dims.split().index(weight.norm.dims)
            norm = self._norm(layer_tensor(layer, weight.norm.name))[slice(*local[axis])]  # [D]
            norm = _whole(weight.norm, norm).astype(np.float32)
            after = values.ndim - 1 - axis
            values = values.astype(np.float32) * norm.reshape(-1, *(1,) * after)
        return self._times(weight.factor, values)

    @staticmethod
    def _times(factor: float, values: np.ndarray) -> np.ndarray:
        return values if factor == 1 else values.astype(np.float32) * np.float32(factor)

    def _form(self, weight: Weight, named: Callable[[str], str], bounds: Bounds) -> np.ndarray:
        rows = [tensor.rows(self._spec) for tensor in weight.tensors]
        before = [tensor.first_row(self._spec) for tensor in weight.tensors]

        def fetch(index: int, wanted: slice, cols: slice) -> np.ndarray:
            """Rows beyond the tensor's are zeros: they pad the vocabulary."""
            first, last = (
                before[index] + min(end, rows[index]) for end in (wanted.start, wanted.stop)
            )
            tensor = weight.tensors[index]
            found = self._checkpoint.read(named(tensor.name), slice(first, last), cols)
            found = _ordered(tensor, _whole(tensor, found))
            missing = wanted.stop - wanted.start - len(found)
            return (
                np.pad(found, ((0, missing), *((0, 0),) * (found.ndim - 1))) if missing else found
            )

        units = self._spec.sizes[weight.form.unit] if weight.form.unit else 1
        return weight.form.read(fetch, rows, units, bounds)
