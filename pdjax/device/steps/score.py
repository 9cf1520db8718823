"""score_step: log-probabilities of tokens of prompts, from the residual stream of a prefill step.

It is a step of its own, dispatched only where they are asked for. It takes a slice of positions at
a time, so that the logits of a long prompt never lie in memory at once; and several slices a call
where there are as many, since a call costs the host about what a slice costs a GPU.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pdjax.core.model_spec import ModelSpec
from pdjax.device.kept.program import KeptProgram
from pdjax.device.mesh import HOST, TP, shardings
from pdjax.device.models.decoder import Params, unembed
from pdjax.device.models.sampling import Logprobs, report
from pdjax.device.packing import Packed
from pdjax.device.sharing import Specs, shared
from pdjax.interfaces.batches import ScoreBatch

SLICE = 128
"""Positions whose logits are made at once: with a vocabulary of 128,000, and with what is made of
them, 400 MB on a GPU."""

MOST_SLICES = 8
"""Slices of a call."""


@struct.dataclass
class Scored:
    """Device arrays of `interfaces.Scores`."""

    logprobs: Logprobs
    ranks: jax.Array  # i32[S]


def pack(scored: ScoreBatch | None, tokens: int) -> Iterator[Packed]:
    """The calls that a ScoreBatch takes over a step of T = `tokens`: of MOST_SLICES as long as they
    are filled, then of one slice, padded. None is a rehearsal of each size that may come. Padding
    scores token 0 after the step's first."""
    short, long = min(tokens, SLICE), MOST_SLICES * SLICE
    sizes = [short] if tokens < long else [long, short]
    nothing = np.zeros(sum(sizes), np.int32)
    at, targets = (nothing, nothing) if scored is None else (scored.at, scored.targets)
    start = 0
    while start < len(at):
        size = sizes[0] if len(at) - start >= sizes[0] else short
        part = slice(start, start + size)
        start, missing = part.stop, (0, size - len(at[part]))
        yield Packed.of(
            {"at": np.pad(at[part], missing), "targets": np.pad(targets[part], missing)}
        )


def make_score_step(params: Params, spec: ModelSpec, tp: int, max_logprobs: int) -> KeptProgram:
    """(params without layers, residual stream [T, D], packed ScoreBatch [S]) -> log-probabilities
    of S tokens, in pinned memory of the host. Equal arguments give the same program.

    Args:
      params: as they lie on the prefill mesh.
      spec: the model's shapes.
      tp: shards of the mesh.
      max_logprobs: n, how many of the likeliest tokens are reported.
    """
    outer = replace(params, layers=[])
    mesh = outer.unembed.sharding.mesh
    return _make(mesh, Specs.of(outer), spec, tp, min(max_logprobs, spec.vocab_size))


@shared
def _make(mesh: Mesh, weights: Specs, spec: ModelSpec, tp: int, n: int) -> KeptProgram:
    axes = (TP,) if tp > 1 else ()

    def step(outer: Params, x: jax.Array, packed: Packed) -> Scored:
        def score(positions: tuple[jax.Array, jax.Array]) -> Scored:
            at, targets = positions
            logits = unembed(outer, x[at], spec=spec, vocab_axes=axes)  # [SLICE, V]
            theirs = jnp.take_along_axis(logits, targets[:, None], axis=1)
            ranks = 1 + jnp.sum(logits > theirs, axis=1, dtype=jnp.int32)
            return Scored(report(logits, targets, n), ranks)

        batch = ScoreBatch(**packed.unpack())
        positions = batch.at, batch.targets
        if len(batch.at) <= SLICE:
            return score(positions)
        slices = jax.tree.map(lambda array: array.reshape(-1, SLICE), positions)
        found = lax.map(score, slices)
        return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), found)

    ins: Any = weights.tree, P(), P()
    mapped = jax.shard_map(step, mesh=mesh, in_specs=ins, out_specs=P(), check_vma=False)
    jitted = jax.jit(
        mapped, in_shardings=shardings(mesh, ins), out_shardings=shardings(mesh, P(), HOST)
    )
    return KeptProgram("score", jitted, mesh, weights, spec, tp, n)
