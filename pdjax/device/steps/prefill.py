"""prefill_step: packed chunks of several prompts, on a tensor-parallel mesh, KV written straight
into the paged pool. `sample_step` then chooses each finished prompt's first token."""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.add_rms.reference import rms_scale
from pallas_kernels.kv_write.api import rope_and_write
from pallas_kernels.prefill_attention.api import prefill_attention
from pdjax.core.kv_layout import split_groups
from pdjax.core.model_spec import ModelSpec
from pdjax.device.kept.ahead import Call
from pdjax.device.kept.program import KeptProgram
from pdjax.device.kv.pool import KVPool, Layers, PoolOwner, page_specs
from pdjax.device.mesh import PREFILL_RULES, TP, shardings
from pdjax.device.models.attention import AttendPages, attend_at
from pdjax.device.models.decoder import Params, embed, forward, through, unembed
from pdjax.device.models.family import Attend, Layer, LayerKind, ModelFamily
from pdjax.device.models.registry import family_of
from pdjax.device.packing import Packed
from pdjax.device.sharing import Specs, shared
from pdjax.device.steps.sample import Undecided
from pdjax.interfaces.batches import PrefillBatch

_LATER = ("sampling", "history", "masks", "scored")
"""Fields of a PrefillBatch that only the steps after it read."""


def pack(batch: PrefillBatch) -> Packed:
    """The fields of a batch that the step reads."""
    return Packed.of({name: x for name, x in vars(batch).items() if name not in _LATER})


def unpack(packed: Packed) -> PrefillBatch:
    """The fields again, within a program."""
    fields: dict[str, Any] = dict.fromkeys(_LATER)
    return PrefillBatch(**fields | packed.unpack())


def make_prefill_step(
    params: Params, spec: ModelSpec, tp: int, groups: int = 1
) -> "KeptProgram | GroupedPrefillStep":
    """(params, pool DONATED, packed batch) -> (pool, the tokens that follow those at `sample_at`,
    [T, D] residual stream behind the layers), as one program; or as several, see
    GroupedPrefillStep. Equal arguments give the same programs.

    The residual stream is there anyway, since the logits of `sample_at` are made from it; `score`
    makes others.

    Args:
      params: as they lie on the prefill mesh; their shardings are the step's.
      spec: the model's shapes.
      tp: shards of the mesh.
      groups: of layers, `split_groups`, each of which becomes a program if there are several.
    """
    mesh = params.unembed.sharding.mesh
    return _make(mesh, Specs.of(params), family_of(spec), spec, tp, groups)


@shared
def _make(
    mesh: Mesh, weights: Specs, family: ModelFamily, spec: ModelSpec, tp: int, groups: int
) -> "KeptProgram | GroupedPrefillStep":
    make = _Programs(mesh, weights, family, spec, tp)
    return make.whole() if groups == 1 else GroupedPrefillStep(make, groups)


class GroupedPrefillStep:
    """The step as several programs, so that KV of a layer group may leave while the next computes.
    Groups of the same kinds of layers share a program. The residual stream passes from group to
    group together with its scale, as it does from layer to layer, so that the step gives the same
    bits as one program (on the CPU, where a test compares them).

    Attributes:
      groups: their layers.
      program: the step that this one is, for one caller; see `KeptProgram.over`.
    """

    def __init__(self, make: "_Programs", groups: int) -> None:
        self.groups, self.program = split_groups(make.spec.num_layers, groups), self
        self._embed: Any = make.embed()
        self._logits: Any = make.logits()
        programs: dict[tuple[LayerKind, ...], KeptProgram] = {}
        kinds = [make.kinds[group.start : group.stop] for group in self.groups]
        for its_kinds, group in zip(kinds, self.groups, strict=True):
            if its_kinds not in programs:
                programs[its_kinds] = make.layers(group)
        self._layers: list[Any] = [programs[its_kinds] for its_kinds in kinds]

    def over(self, same: int) -> "GroupedPrefillStep":
        """The step for a caller whose first two arguments, parameters and pool, stay the same; see
        `KeptProgram.over`."""
        step = copy(self)
        step._embed, step._logits = self._embed.over(1), self._logits.over(1)
        step._layers = [program.over(same) for program in self._layers]
        return step

    def __call__(
        self,
        params: Params,
        pool: PoolOwner,
        packed: Packed,
        after_group: Callable[[int], None] = lambda group: None,
    ) -> tuple[Undecided, jax.Array]:
        """Dispatch the step; returns the tokens that follow, and the residual stream. When
        `after_group(g)` is called, the program of group g has been dispatched, `pool` holds its
        result, and nothing that follows has been dispatched."""
        outer = replace(params, layers=[])
        x, scale, packed = self._embed(outer, packed)
        for index, group in enumerate(self.groups):
            layers = params.layers[group.start : group.stop]
            program = self._layers[index]
            pages, x, scale = program(layers, pool.layers(group), x, scale, packed)
            pool.replace(group, pages)
            after_group(index)
        return self._logits(outer, x, packed), x

    def calls(
        self, params: Params, pages: KVPool, packed: Packed, x: jax.ShapeDtypeStruct
    ) -> Iterator[Call]:
        """The programs that the step calls, over a pool of `pages`, with arguments of the same
        shapes; `x` is that of the residual stream."""
        outer, scale = replace(params, layers=[]), jax.ShapeDtypeStruct(x.shape[:1], jnp.float32)
        yield self._embed.program, (outer, packed)
        for program, group in zip(self._layers, self.groups, strict=True):
            own = slice(group.start, group.stop)
            yield program.program, (params.layers[own], pages[own], x, scale, packed)
        yield self._logits.program, (outer, x, packed)


class _Programs:
    """Makes the programs of a step, each jitted over the mesh of the parameters."""

    def __init__(
        self, mesh: Mesh, weights: Specs, family: ModelFamily, spec: ModelSpec, tp: int
    ) -> None:
        self.spec, self.kinds = spec, tuple(family.kinds(spec))
        self._mesh, self._facts = mesh, (weights, family, spec, tp)
        self._vocab_axes = (TP,) if tp > 1 else ()
        self._reduce = partial(lax.psum, axis_name=TP) if tp > 1 else None
        self._weights: Params = weights.tree
        self._outer: Params = replace(self._weights, layers=[])
        planes = [family.planes(spec, kind) for kind in self.kinds]
        self._pages = page_specs(planes, PREFILL_RULES)

    def whole(self) -> KeptProgram:
        """The step, as one program."""

        def step(
            params: Params, pool: KVPool, packed: Packed
        ) -> tuple[KVPool, Undecided, jax.Array]:
            batch = unpack(packed)
            x, layers = forward(
                params,
                embed(params, batch.tokens, spec=self.spec, vocab_axes=self._vocab_axes),  # [T, D]
                pool,
                self._attend(batch),
                self.kinds,
                spec=self.spec,
                reduce=self._reduce,
                live=live_tokens(batch),
            )
            return layers, self._undecided(params, x, batch), x

        ins = self._weights, self._pages, P()
        return self._compile("prefill", step, ins, (self._pages, P(), P()), donate=(1,))

    def embed(self) -> KeptProgram:
        """(params without layers, packed) -> (x [T, D], its scale f32[T], packed on the devices:
        the programs that follow need not upload it again)."""

        def start(outer: Params, packed: Packed) -> tuple[jax.Array, jax.Array, Packed]:
            tokens = unpack(packed).tokens
            x = embed(outer, tokens, spec=self.spec, vocab_axes=self._vocab_axes)
            return x, rms_scale(x, self.spec.norm_eps), packed

        return self._compile("prefill embed", start, (self._outer, P()), P())

    def layers(self, like: range) -> KeptProgram:
        """(layers of the kinds of the layers `like`, their pages DONATED, x DONATED, scale DONATED,
        packed) -> (pages, x, scale)."""
        kinds = self.kinds[like.start : like.stop]

        def group(
            layers: list[Layer], pages: Layers, x: jax.Array, scale: jax.Array, packed: Packed
        ) -> tuple[Layers, jax.Array, jax.Array]:
            batch = unpack(packed)
            options: Any = {"spec": self.spec, "reduce": self._reduce, "live": live_tokens(batch)}
            attend = self._attend(batch)
            x, scale, pages = through(layers, x, scale, pages, attend, kinds, **options)
            return pages, x, scale

        weights, pages = (x[like.start : like.stop] for x in (self._weights.layers, self._pages))
        ins = weights, pages, P(), P(), P()
        outs = pages, P(), P()
        return self._compile("prefill layers", group, ins, outs, donate=(1, 2, 3), facts=kinds)

    def logits(self) -> KeptProgram:
        """(params without layers, x [T, D], packed) -> the tokens that follow."""

        def finish(outer: Params, x: jax.Array, packed: Packed) -> Undecided:
            return self._undecided(outer, x, unpack(packed))

        return self._compile("prefill logits", finish, (self._outer, P(), P()), P())

    def _attend(self, batch: PrefillBatch) -> Attend:
        return attend_at(self.spec, self.kinds, batch.positions, attend_chunks(batch))

    def _undecided(self, params: Params, x: jax.Array, batch: PrefillBatch) -> Undecided:
        rows = x[batch.sample_at]
        logits = unembed(params, rows, spec=self.spec, vocab_axes=self._vocab_axes)  # [B, V]
        return undecided(logits, batch)

    def _compile(
        self,
        name: str,
        program: Any,
        ins: Any,
        outs: Any,
        donate: tuple[int, ...] = (),
        facts: tuple[Any, ...] = (),
    ) -> KeptProgram:
        mapped = jax.shard_map(
            program, mesh=self._mesh, in_specs=ins, out_specs=outs, check_vma=False
        )
        jitted = jax.jit(
            mapped,
            donate_argnums=donate,
            in_shardings=shardings(self._mesh, ins),
            out_shardings=shardings(self._mesh, outs),
        )
        return KeptProgram(name, jitted, self._mesh, *self._facts, *facts)


def undecided(logits: jax.Array, batch: PrefillBatch) -> Undecided:
    """The tokens that follow those at `sample_at`, of logits f32[B, V]."""
    return Undecided(logits, positions=batch.kv_lens, rows=jnp.arange(len(batch.kv_lens)))


def live_tokens(batch: PrefillBatch) -> jax.Array:
    """bool[T]: which are tokens of a sequence, and no padding."""
    return jnp.arange(len(batch.tokens)) < batch.cu_q_lens[-1]


def attend_chunks(batch: PrefillBatch) -> AttendPages:
    """Write the chunks' KV, then attend to it and to what earlier chunks wrote."""
    # For floating pages only: a config has no others on the prefill side, and prefill attention
    # reads no others.
    write: Any = partial(rope_and_write, slot_mapping=batch.slot_mapping)

    def attend(*layer: Any, **options: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k_pages, v_pages = write(*layer)
        o = prefill_attention(
            q,
            k_pages,
            v_pages,
            batch.kv_pages,
            batch.cu_pages,
            batch.cu_q_lens,
            batch.kv_lens,
            **options,
        )
        return o, k_pages, v_pages

    return attend
