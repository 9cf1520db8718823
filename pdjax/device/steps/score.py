"""score_step: log-probabilities of tokens of prompts, from the residual stream of a prefill step.

It is a step of its own, dispatched only where they are asked for. It takes a few positions at a
time, so that the logits of a long prompt never lie in memory at once.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pdjax.core.model_spec import ModelSpec
from pdjax.device.mesh import HOST, TP, shardings
from pdjax.device.models.decoder import Params, unembed
from pdjax.device.models.sampling import Logprobs, report
from pdjax.device.packing import Packed
from pdjax.device.sharing import Specs, shared
from pdjax.interfaces.batches import ScoreBatch

MOST_POSITIONS = 128
"""Positions that one call takes: 80 MB of logits for a vocabulary of 150,000."""


@struct.dataclass
class Scored:
    """Device arrays of `interfaces.Scores`."""

    logprobs: Logprobs
    ranks: jax.Array  # i32[S]


ScoreStep = Callable[[Params, jax.Array, Packed], Scored]


def pack(scored: ScoreBatch | None, tokens: int) -> Iterator[Packed]:
    """The calls that a ScoreBatch takes over a step of T = `tokens`, each of as many positions;
    None is a rehearsal of one call. Padding scores token 0 after the step's first."""
    size = min(tokens, MOST_POSITIONS)
    nothing = np.zeros(1, np.int32)
    at, targets = (nothing, nothing) if scored is None else (scored.at, scored.targets)
    for start in range(0, len(at), size):
        part = slice(start, start + size)
        missing = (0, size - len(at[part]))
        yield Packed.of(
            {"at": np.pad(at[part], missing), "targets": np.pad(targets[part], missing)}
        )


def make_score_step(params: Params, spec: ModelSpec, tp: int, max_logprobs: int) -> ScoreStep:
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
def _make(mesh: Mesh, weights: Specs, spec: ModelSpec, tp: int, n: int) -> ScoreStep:
    axes = (TP,) if tp > 1 else ()

    def step(outer: Params, x: jax.Array, packed: Packed) -> Scored:
        batch = ScoreBatch(**packed.unpack())
        logits = unembed(outer, x[batch.at], spec=spec, vocab_axes=axes)  # [S, V]
        theirs = jnp.take_along_axis(logits, batch.targets[:, None], axis=1)
        ranks = 1 + jnp.sum(logits > theirs, axis=1, dtype=jnp.int32)
        return Scored(report(logits, batch.targets, n), ranks)

    ins: Any = weights.tree, P(), P()
    mapped = jax.shard_map(step, mesh=mesh, in_specs=ins, out_specs=P(), check_vma=False)
    return jax.jit(
        mapped, in_shardings=shardings(mesh, ins), out_shardings=shardings(mesh, P(), HOST)
    )
