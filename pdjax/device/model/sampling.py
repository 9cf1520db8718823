"""Choosing the next token: pure functions of logits, parameters, and where in its sequence the
token stands.

One compiled program serves every mixture of requests in a batch: what nobody asks for is skipped by
`lax.cond` at run time. A token's chance comes from (seed, position) alone, so it does not depend on
batching, placement or preemption.

top-k and top-p need no sort: the threshold logit is found by bisection on the bits of the float,
which is exact and costs 32 sums over the vocabulary.
"""

from collections.abc import Callable
from dataclasses import fields

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from pdjax.engine_api import SamplingBatch

jax.tree_util.register_dataclass(
    SamplingBatch, data_fields=[f.name for f in fields(SamplingBatch)], meta_fields=[]
)


@struct.dataclass
class Choice:
    """Device arrays of `engine_api.Sampled`."""

    tokens: jax.Array  # i32[B]
    chosen_logprobs: jax.Array  # f32[B]
    top_ids: jax.Array  # i32[B, n]
    top_logprobs: jax.Array  # f32[B, n]


def choose(
    logits: jax.Array,
    positions: jax.Array,
    params: SamplingBatch,
    history: jax.Array | None,
    *,
    max_logprobs: int,
) -> Choice:
    """The next token of each row.

    Args:
      logits: f32[B, V].
      positions: i32[B] position that the chosen token will take, the number of tokens before it.
      params: [B] of each field.
      history: i32[B, C] the tokens before it; None where no row is penalized.
      max_logprobs: n, how many of the likeliest tokens to report.
    """
    penalized = logits if history is None else _penalize(logits, positions, params, history)
    greedy = jnp.argmax(penalized, axis=-1).astype(jnp.int32)
    warm = params.temperature > 0
    tokens = lax.cond(
        warm.any(),
        lambda: jnp.where(warm, _draw(penalized, positions, params), greedy),
        lambda: greedy,
    )
    return _report(logits, tokens, params.logprobs, min(max_logprobs, logits.shape[1]))


def _penalize(
    logits: jax.Array, positions: jax.Array, params: SamplingBatch, history: jax.Array
) -> jax.Array:
    presence, frequency, repetition = (
        params.presence_penalty,
        params.frequency_penalty,
        params.repetition_penalty,
    )

    def apply() -> jax.Array:
        index = jnp.arange(history.shape[1])
        row = jnp.arange(history.shape[0])[:, None]
        valid = index < positions[:, None]  # [B, C]
        output = valid & (index >= params.prompt_lens[:, None])
        seen = jnp.zeros(logits.shape, bool).at[row, history].max(valid)
        count = (
            jnp.zeros(logits.shape, jnp.float32).at[row, history].add(output.astype(jnp.float32))
        )
        scaled = jnp.where(logits > 0, logits / repetition[:, None], logits * repetition[:, None])
        out = jnp.where(seen, scaled, logits)
        return out - frequency[:, None] * count - presence[:, None] * (count > 0)

    wanted = (presence != 0) | (frequency != 0) | (repetition != 1)
    return lax.cond(wanted.any(), apply, lambda: logits)


def _draw(logits: jax.Array, positions: jax.Array, params: SamplingBatch) -> jax.Array:
    """Tokens i32[B] drawn from the filtered, tempered distribution, by the Gumbel-max trick."""
    # Below the smallest normal number, devices differ in whether they divide by zero.
    least = jnp.finfo(jnp.float32).tiny
    temperature = jnp.where(params.temperature > 0, jnp.maximum(params.temperature, least), 1.0)
    # From the largest logit downwards, so that what a tiny temperature overflows is only unlikely.
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / temperature[:, None]
    filtering = (params.temperature > 0) & (
        (params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0)
    )
    scaled = lax.cond(filtering.any(), lambda: _filter(scaled, params), lambda: scaled)

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, logits.shape[1:], jnp.float32)

    return jnp.argmax(scaled + jax.vmap(noise)(params.seed, positions), axis=-1).astype(jnp.int32)


def _filter(logits: jax.Array, params: SamplingBatch) -> jax.Array:
    """logits f32[B, V] with -inf where top-k, then top-p of what is left, or min-p drops a
    token."""
    vocab = logits.shape[1]
    keys = _sortable(logits)
    k = jnp.where(params.top_k > 0, jnp.minimum(params.top_k, vocab), vocab)
    kept = keys >= _threshold(lambda t: jnp.sum(keys >= t, axis=1) >= k, keys)
    probs = jnp.where(kept, jax.nn.softmax(logits, axis=-1), 0.0)
    goal = params.top_p * probs.sum(axis=1)
    top_p = keys >= _threshold(lambda t: jnp.sum(probs * (keys >= t), axis=1) >= goal, keys)
    kept &= top_p | (params.top_p[:, None] >= 1)
    kept &= probs >= params.min_p[:, None] * probs.max(axis=1, keepdims=True)
    return jnp.where(kept, logits, -jnp.inf)


def _sortable(x: jax.Array) -> jax.Array:
    """f32 -> u32 in the same order."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(enough: Callable[[jax.Array], jax.Array], keys: jax.Array) -> jax.Array:
    """The largest u32[B, 1] t for which `enough(t)`, decided bit by bit; `enough` must hold at 0
    and be monotone."""

    def decide(i: jax.Array, t: jax.Array) -> jax.Array:
        trial = t | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(trial)[:, None], trial, t)

    return lax.fori_loop(0, 32, decide, jnp.zeros((keys.shape[0], 1), jnp.uint32))


def _report(logits: jax.Array, tokens: jax.Array, wanted: jax.Array, n: int) -> Choice:
    """Log-probabilities of the model's own distribution: of the chosen tokens, and of the n
    likeliest."""
    batch = logits.shape[0]

    def measure() -> tuple[jax.Array, jax.Array, jax.Array]:
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        values, ids = lax.top_k(logprobs, n)
        return (
            jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0],
            ids.astype(jnp.int32),
            values,
        )

    def skip() -> tuple[jax.Array, jax.Array, jax.Array]:
        return jnp.zeros(batch), jnp.zeros((batch, n), jnp.int32), jnp.zeros((batch, n))

    chosen, ids, values = lax.cond(wanted.any(), measure, skip)
    return Choice(tokens=tokens, chosen_logprobs=chosen, top_ids=ids, top_logprobs=values)
