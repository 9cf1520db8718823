"""Decode ticks on a pipeline of stages."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from pdjax.core.model_spec import ModelSpec
from pdjax.device.compat import is_sound
from pdjax.device.kept.ahead import Call
from pdjax.device.kept.program import Over
from pdjax.device.kv.pool import PoolOwner
from pdjax.device.mesh import shardings
from pdjax.device.models.decoder import Params
from pdjax.device.models.sampling import Asked, all_asked
from pdjax.device.programs.program import AfterGroup
from pdjax.device.programs.sampled import SampledTicket, nothing_sampled
from pdjax.device.sharing import rehearsals, shapes_of, shared
from pdjax.device.steps import decode
from pdjax.device.steps.sample import Undecided, make_sample_step
from pdjax.interfaces.batches import IDLE_ROW, DecodeBatch, Masks, Sampled, SamplingBatch
from pdjax.interfaces.steps import DecodeStep, StepKind
from pdjax.interfaces.tickets import Ticket


class DecodeProgram:
    """Decode ticks, and what lives on the devices from tick to tick; see `Program`.

    Args:
      params: as they lie on the pool's mesh, layers stacked over stages.
      spec: the model's shapes.
      pool: that the ticks write.
      rows: over all microbatches.
      context: the longest sequence, tokens.
      max_logprobs: how many log-probabilities a row gets.
      attention: `append_attention`'s implementation by name, or None for the platform's.

    Attributes:
      fed_back: see `make_decode_tick`.
      max_logprobs: as given, and at most the vocabulary's size.
    """

    kind = StepKind.DECODE

    def __init__(
        self,
        params: Params,
        spec: ModelSpec,
        pool: PoolOwner,
        *,
        rows: int,
        context: int,
        max_logprobs: int,
        attention: str | None,
    ) -> None:
        self.layer_groups: tuple[range, ...] = (range(spec.num_layers),)
        self.rows = rows
        self.losses = 0
        self._params, self._pool = params, pool
        self._vocab_size = spec.vocab_size
        self.max_logprobs = min(max_logprobs, spec.vocab_size)
        self._tick = decode.make_decode_tick(params, spec, pool.layout, attention=attention)
        self._sample = make_sample_step(pool.mesh, self.max_logprobs)
        self._uploads = _Uploads(pool.mesh, spec.vocab_size)
        # What lives on the device from tick to tick: see `make_decode_tick`; and i32[R * b, C], the
        # tokens of every row, for penalties.
        b = rows // pool.layout.stages
        self._make_state = _zeros(
            pool.mesh,
            (decode.X_SPEC, (rows, spec.model_dim), params.final_norm.dtype),
            (PartitionSpec(), (b,), jnp.dtype("int32")),
            (PartitionSpec(), (rows, context), jnp.dtype("int32")),
        )
        self._x: Any  # as the other two, None once the program is closed
        self.fed_back: Any
        self._history: Any
        self._sizes: dict[int, Size]  # by n
        self._begin()

    def _begin(self) -> None:
        """The state that lives from tick to tick, of idle rows."""
        self._x, self.fed_back, self._history = self._make_state()
        self._sizes = {}

    def size(self, n: int) -> "Size":
        """What ticks of n entries have of their own."""
        if n not in self._sizes:
            make = _zeros(
                self._pool.mesh,
                (PartitionSpec(), (n, self._vocab_size), jnp.dtype("float32")),
                (PartitionSpec(), (n,), jnp.dtype("int32")),
                (PartitionSpec(), (n,), jnp.dtype("int32")),
            )
            self._sizes[n] = Size(self._tick.over(4), Undecided(*make()))
        return self._sizes[n]

    def dispatch(self, step: DecodeStep, after_group: AfterGroup) -> Ticket[Sampled]:
        if (step.batch.positions != IDLE_ROW).any():
            return self._dispatch(step.batch, after_group)
        batch, known = step.batch, rehearsals(self._tick, self._sample)
        state = self._x, self.fed_back, self._history
        table = batch.page_table.shape
        shapes = table, shapes_of(self._params, self._pool.arrays, state)
        if shapes in known:
            self.size(len(batch.tokens))
            after_group(0)
            return nothing_sampled(len(batch.tokens), self.max_logprobs)
        ticket = self._dispatch(batch, after_group)
        known.add(shapes)
        return ticket

    def _dispatch(self, batch: DecodeBatch, after_group: AfterGroup) -> SampledTicket:
        with self.donated():
            size = self.size(len(batch.tokens))
            self._pool.arrays, carried = size.tick(
                self._params,
                self._pool.arrays,
                decode.Carried(self._x, size.undecided),
                self.fed_back,
                decode.pack(batch),
            )
            self._x, size.undecided = carried.x, carried.undecided
            ticket = self.choose(batch)
        after_group(0)
        return ticket

    def choose(self, batch: DecodeBatch) -> SampledTicket:
        """Choose the next tokens of the microbatch that leaves, whose logits the batch's `size`
        has; within `donated`."""
        size = self.size(len(batch.tokens))
        for asked in self._asked(batch):
            self.fed_back, self._history, choice = self._sample(
                size.undecided, self.fed_back, self._history, asked
            )
        return SampledTicket(choice, batch.sampling, self.max_logprobs, self._inspect)

    def calls(self, step: DecodeStep) -> Iterator[Call]:
        batch, undecided = step.batch, Undecided.shapes(len(step.batch.tokens), self._vocab_size)
        state = self._pool.arrays, decode.Carried(self._x, undecided), self.fed_back
        yield self._tick, (self._params, *state, decode.pack(batch))
        for asked in self._ways(batch):
            yield self._sample, (undecided, self.fed_back, self._history, asked)

    def feed(self, row: int, tokens: jax.Array | np.ndarray, index: int) -> None:
        place = row % len(self.fed_back)
        arriving = _on_each_device(tokens, self._pool.mesh)
        with self.donated():
            self.fed_back = _feed(self.fed_back, np.int32(place), arriving, np.int32(index))

    def set_history(self, row: int, token_ids: np.ndarray) -> None:
        with self.donated():
            self._history = _write_history(self._history, np.int32(row), token_ids)

    def close(self) -> None:
        self._params = replace(self._params, layers=[], final_norm=None, unembed=None, embed=None)
        self._x = self.fed_back = self._history = None
        self._sizes.clear()
        self._uploads.clear()

    @contextmanager
    def donated(self) -> Iterator[None]:
        """A block that donates the pool or the state; see `PoolOwner.donated`."""
        with self._pool.donated():
            try:
                yield
            except BaseException:
                self._inspect()
                raise

    def _inspect(self) -> None:
        """Make again, of pool and state, what is deleted or whose computation has failed."""
        self._pool.inspect()
        undecided = [size.undecided for size in self._sizes.values()]
        if not is_sound((self._x, undecided, self.fed_back, self._history)):
            self._begin()
            self.losses += 1

    def _asked(self, batch: DecodeBatch) -> list[Asked]:
        """How tokens are chosen, on the devices; of a rehearsal, in all ways."""
        if (batch.positions != IDLE_ROW).any():
            leaving, n = decode.leaving_microbatch(batch), len(batch.tokens)
            return [self._uploads.of(leaving, batch.sampling, n, batch.masks)]
        return [self._uploads.put(each) for each in self._ways(batch)]

    def _ways(self, batch: DecodeBatch) -> list[Asked]:
        """All ways in which tokens of such a batch may be chosen."""
        return all_asked(batch.sampling, self._vocab_size, len(batch.tokens))


@dataclass
class Size:
    """Of ticks of one number of entries: the program, and the logits that each writes over those of
    the last."""

    tick: Over
    undecided: Undecided


class _Uploads:
    """What microbatches ask for, kept on the devices for as long as the host hands over the same
    object. Masks are not kept: they are new at each tick."""

    def __init__(self, mesh: Mesh, vocab_size: int) -> None:
        self._everywhere, self._vocab_size = shardings(mesh, PartitionSpec()), vocab_size
        self._kept: dict[tuple[int, bool], tuple[SamplingBatch, Asked]] = {}

    def of(self, microbatch: int, sampling: SamplingBatch, n: int, masks: Masks | None) -> Asked:
        """What numpy `sampling` and `masks` of n entries ask for."""
        key = microbatch, masks is not None
        kept = self._kept.get(key)
        if kept is None or kept[0] is not sampling:
            asked = self.put(Asked.of(sampling, self._vocab_size, n, masks))
            self._kept[key] = sampling, asked
            return asked
        if masks is None and not kept[1].variant.constrain:
            return kept[1]
        return kept[1].masked(masks, n, self._vocab_size)

    def put(self, asked: Asked) -> Asked:
        """The same on the devices; masks go there with the step."""
        kept = jax.device_put(replace(asked, masks=None), self._everywhere)
        return replace(kept, masks=asked.masks)

    def clear(self) -> None:
        """Keep nothing."""
        self._kept.clear()


def _on_each_device(array: jax.Array | np.ndarray, mesh: Mesh) -> jax.Array:
    """A small array, which may lie whole on each device of another mesh, on each of this one: in
    single-device pieces, so that no put changes a layout."""
    piece = array if isinstance(array, np.ndarray) else array.addressable_shards[0].data
    devices = list(mesh.devices.flat)
    pieces = jax.device_put([piece] * len(devices), devices)
    everywhere = shardings(mesh, PartitionSpec())
    return jax.make_array_from_single_device_arrays(piece.shape, everywhere, pieces)


@partial(jax.jit, donate_argnums=0)
def _feed(fed_back: jax.Array, place: np.int32, tokens: jax.Array, index: np.int32) -> jax.Array:
    """fed_back i32[b] DONATED, with the index-th of tokens i32[B] in a place."""
    return fed_back.at[place].set(tokens[index])


@partial(jax.jit, donate_argnums=0)
def _write_history(history: jax.Array, row: np.int32, ids: np.ndarray) -> jax.Array:
    """history i32[rows, C] DONATED, with the tokens i32[C] of a row."""
    return history.at[row].set(ids)


@shared
def _zeros(
    mesh: Mesh, *wanted: tuple[PartitionSpec, tuple[int, ...], jnp.dtype]
) -> Callable[[], tuple[jax.Array, ...]]:
    """Makes arrays of zeros, each given as (PartitionSpec, shape, dtype)."""
    return jax.jit(
        lambda: tuple(jnp.zeros(shape, dtype) for _, shape, dtype in wanted),
        out_shardings=tuple(shardings(mesh, spec) for spec, _, _ in wanted),
    )
