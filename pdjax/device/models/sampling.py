"""Choosing the next token: pure functions of logits, parameters, and where in its sequence the
token stands.

What no row of a batch asks for is left out of the program: there are a few programs, VARIANTS, and
the host's arrays say which one serves a batch. (A `lax.cond` on the device would make the host wait
for its predicate.) A token's chance comes from (seed, position) alone, and every variant gives a
row the same bits, so a token does not depend on batching, placement or preemption.

top-k and top-p need no sort: the threshold logit is found by bisection on the bits of the float,
which is exact and costs 32 sums over the vocabulary.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from pdjax.core.request import MAX_LOGIT_BIAS
from pdjax.device.packing import Packed
from pdjax.interfaces.batches import NO_TOKEN, NOT_FINITE, Masks, SamplingBatch


@dataclass(frozen=True)
class Wanted:
    """What a program that chooses tokens does besides taking the largest logit."""

    draw: bool = False
    filter: bool = False
    penalize: bool = False
    logprobs: bool = False
    constrain: bool = False  # by masks and biases

    @classmethod
    def by(cls, sampling: SamplingBatch, masks: Masks | None = None) -> "Wanted":
        """What the rows of a batch of numpy arrays ask for, all taken together."""
        warm = sampling.temperature > 0
        filtered = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
        penalized = (
            (sampling.presence_penalty != 0)
            | (sampling.frequency_penalty != 0)
            | (sampling.repetition_penalty != 1)
        )
        return cls(
            draw=bool(warm.any()),
            filter=bool((warm & filtered).any()),
            penalize=bool(penalized.any()),
            logprobs=bool(sampling.logprobs.any()),
            constrain=masks is not None or sampling.bias is not None,
        )

    def covers(self, other: "Wanted") -> bool:
        """Whether a program that can do this can do `other`."""
        return all(can or not must for can, must in zip(astuple(self), astuple(other), strict=True))


_LEAST = jnp.finfo(jnp.float32).tiny
"""The smallest normal number. Below it, devices differ in whether they divide by zero."""

VARIANTS = (
    Wanted(),
    Wanted(draw=True),
    Wanted(draw=True, constrain=True),
    Wanted(draw=True, filter=True, logprobs=True),
    Wanted(draw=True, filter=True, logprobs=True, penalize=True),
    Wanted(draw=True, filter=True, logprobs=True, penalize=True, constrain=True),
)
"""The programs that there are, cheapest first; the last covers everything."""


_MASK_SIZES = (8, 64)
"""Masks for which there are smaller uploads than one of a mask a row, which takes hundreds of rows
of a large vocabulary a part of a millisecond to make."""


@dataclass(frozen=True)
class Asked:
    """What a batch of b rows asks for: the program that serves it, and the fields of the
    SamplingBatch and the masks that this program reads. Tokens may be chosen for some of the rows
    alone."""

    variant: Wanted  # static
    packed: Packed | None  # None: the variant reads nothing
    masks: Masks | None = None  # None: the variant takes none

    @classmethod
    def of(
        cls,
        sampling: SamplingBatch,
        vocab_size: int,
        rows: int,
        masks: Masks | None = None,
        variant: Wanted | None = None,
    ) -> "Asked":
        """Pack numpy arrays for `variant`; None takes the cheapest that covers them. Tokens are
        chosen for so many `rows`, which masks count."""
        if variant is None:
            wanted = Wanted.by(sampling, masks)
            variant = next(each for each in VARIANTS if each.covers(wanted))
        if variant == Wanted():
            return cls(variant, None)
        arrays = {name: array for name, array in vars(sampling).items() if array is not None}
        arrays["logprobs"] = arrays["logprobs"].astype(np.int32)
        if not variant.constrain:
            return cls(variant, Packed.of(arrays))
        if sampling.bias is None:
            shape = len(sampling.seed), MAX_LOGIT_BIAS
            arrays["bias_tokens"] = np.full(shape, NO_TOKEN, np.int32)
            arrays["bias"] = np.zeros(shape, np.float32)
        return cls(variant, Packed.of(arrays)).masked(masks, rows, vocab_size)

    def masked(self, masks: Masks | None, rows: int, vocab_size: int) -> "Asked":
        """The same with other masks, for a variant that takes them; they are padded to one of few
        numbers of masks. They are large, and not packed: that would copy them."""
        count = 0 if masks is None else len(masks.rows)
        size = next(size for size in _mask_sizes(rows) if count <= size)
        if masks is None or count < size:
            which = np.full(size, _NO_ROW, np.int32)
            bits = np.zeros((size, -(-vocab_size // 32)), np.uint32)
            if masks is not None:
                which[:count], bits[:count] = masks.rows, masks.bits
            masks = Masks(which, bits)
        return replace(self, masks=masks)

    def sampling(self, rows: jax.Array | None) -> SamplingBatch:
        """The arrays of some rows i32[n], modulo b, or all where None is given, within a program of
        a variant that reads them."""
        assert self.packed is not None
        arrays = self.packed.unpack()
        if rows is not None:
            places = rows % len(arrays["seed"])
            arrays = {name: array[places] for name, array in arrays.items()}
        return SamplingBatch(**arrays)

    def allowed(self, rows: int, vocab_size: int) -> jax.Array:
        """bool[B, V], the tokens that may be chosen, within a program that takes masks."""
        assert self.masks is not None
        which, bits = self.masks.rows, self.masks.bits
        each = bits[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
        theirs = each.reshape(len(which), -1)[:, :vocab_size] == 1
        return jnp.ones((rows, vocab_size), bool).at[which].set(theirs, mode="drop")


jax.tree_util.register_dataclass(Masks, data_fields=["rows", "bits"], meta_fields=[])
jax.tree_util.register_dataclass(Asked, data_fields=["packed", "masks"], meta_fields=["variant"])

_NO_ROW = np.iinfo(np.int32).max


def _mask_sizes(rows: int) -> tuple[int, ...]:
    return (*(size for size in _MASK_SIZES if size < rows), rows)


def all_asked(
    sampling: SamplingBatch, vocab_size: int, rows: int, *, penalize: bool = True
) -> list[Asked]:
    """A batch in every way that it may come, for a rehearsal: each is a program of its own.

    Args:
      rows: of which tokens are chosen, the most that may have masks.
      penalize: whether ways that read the history are among them.
    """
    variants = [variant for variant in VARIANTS if variant.penalize <= penalize]
    asked = [Asked.of(sampling, vocab_size, rows, variant=variant) for variant in variants]
    constrained = [each for each in asked if each.variant.constrain]
    for size in _mask_sizes(rows)[1:]:
        everywhere = np.full((size, -(-vocab_size // 32)), -1, np.int32).view(np.uint32)
        masks = Masks(np.arange(size, dtype=np.int32), everywhere)
        asked += [each.masked(masks, rows, vocab_size) for each in constrained]
    return asked


@struct.dataclass
class Logprobs:
    """Log-probabilities of the model's own distribution."""

    chosen: jax.Array  # f32[B]
    top_ids: jax.Array  # i32[B, n], best first
    top: jax.Array  # f32[B, n]


@struct.dataclass
class Choice:
    """Device arrays of `interfaces.Sampled`."""

    tokens: jax.Array  # i32[B]; NOT_FINITE where a row's logits are not all finite
    logprobs: Logprobs | None  # None: the variant does not take them


def choose(
    logits: jax.Array,
    positions: jax.Array,
    asked: Asked,
    history: jax.Array | None,
    *,
    rows: jax.Array | None = None,
    max_logprobs: int,
) -> Choice:
    """The next token of each row; NOT_FINITE where a logit of the row is NaN or infinite. Masks and
    biases change neither that nor the log-probabilities.

    Args:
      logits: f32[B, V].
      positions: i32[B] position that the chosen token will take, the number of tokens before it.
      asked: how they are chosen.
      history: i32[B, C] the tokens before it; may be None for a variant without penalties.
      rows: i32[B] theirs in what is asked, modulo its own; None where they are in order.
      max_logprobs: n, how many of the likeliest tokens to report.
    """
    variant, choosable = asked.variant, logits
    if variant.penalize:
        assert history is not None, "penalties need a history"
        choosable = _penalize(logits, positions, asked.sampling(rows), history)
    if variant.constrain:
        choosable = _add_biases(choosable, asked.sampling(rows))
    # Behind a barrier XLA sees the same program in every variant that goes on, so a row's sums are
    # taken in the same order whatever its neighbours ask for.
    choosable = lax.optimization_barrier(choosable)
    # argmax takes NaN for the largest. So the logit that it finds is finite only if all are, and it
    # takes no second look at the vocabulary to know it.
    judged = jnp.where(jnp.isfinite(choosable), choosable, jnp.nan)
    best = jnp.argmax(judged, axis=-1).astype(jnp.int32)
    finite = jnp.isfinite(jnp.take_along_axis(choosable, best[:, None], axis=1)[:, 0])
    if variant.constrain:
        # Behind a barrier as well: what is drawn from rows without a mask has the same bits.
        allowed = asked.allowed(*logits.shape)
        choosable = lax.optimization_barrier(jnp.where(allowed, choosable, -jnp.inf))
        best = jnp.argmax(choosable, axis=-1).astype(jnp.int32)
    tokens = best
    if variant.draw:
        params = asked.sampling(rows)
        drawn = _draw(choosable, positions, params, filtered=variant.filter)
        tokens = jnp.where(params.temperature > 0, drawn, best)
    logprobs = (
        report(logits, tokens, min(max_logprobs, logits.shape[1])) if variant.logprobs else None
    )
    return Choice(jnp.where(finite, tokens, NOT_FINITE), logprobs)


def _penalize(
    logits: jax.Array, positions: jax.Array, params: SamplingBatch, history: jax.Array
) -> jax.Array:
    """logits f32[B, V] after presence, frequency and repetition penalties; rows that ask for none
    keep their bits. A finite logit stays finite, whatever the penalties are, and any other becomes
    NaN."""
    presence, frequency, repetition = (
        params.presence_penalty[:, None],
        params.frequency_penalty[:, None],
        jnp.maximum(params.repetition_penalty, _LEAST)[:, None],
    )
    index = jnp.arange(history.shape[1])
    row = jnp.arange(history.shape[0])[:, None]
    valid = index < positions[:, None]  # [B, C]
    output = valid & (index >= params.prompt_lens[:, None])
    seen = jnp.zeros(logits.shape, bool).at[row, history].max(valid)
    count = jnp.zeros(logits.shape, jnp.float32).at[row, history].add(output.astype(jnp.float32))
    scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
    out = jnp.where(seen, scaled, logits)
    out = out - frequency * count - presence * (count > 0)
    return _still_finite(out, logits)


def _add_biases(logits: jax.Array, params: SamplingBatch) -> jax.Array:
    """logits f32[B, V] with what is added to some tokens'; rows without biases keep their bits."""
    row = jnp.arange(logits.shape[0])[:, None]
    out = logits.at[row, params.bias_tokens].add(params.bias, mode="drop")
    return _still_finite(out, logits)


def _still_finite(changed: jax.Array, logits: jax.Array) -> jax.Array:
    """Changed logits: finite where the logit was, else NaN."""
    most = jnp.finfo(jnp.float32).max
    return jnp.where(jnp.isfinite(logits), jnp.clip(changed, -most, most), jnp.nan)


def _draw(
    logits: jax.Array, positions: jax.Array, params: SamplingBatch, *, filtered: bool
) -> jax.Array:
    """Tokens i32[B] drawn from the tempered and, if any row asks for it, filtered distribution, by
    the Gumbel-max trick."""
    most = jnp.finfo(jnp.float32).max
    temperature = jnp.clip(params.temperature, _LEAST, most)
    temperature = jnp.where(params.temperature > 0, temperature, 1.0)
    # The largest logit becomes 0, so that others overflow to -inf alone under a tiny temperature.
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / temperature[:, None]
    if filtered:
        scaled = _filter(scaled, params)
    scaled = lax.optimization_barrier(scaled)  # as in `choose`

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, logits.shape[1:], jnp.float32)

    return jnp.argmax(scaled + jax.vmap(noise)(params.seed, positions), axis=-1).astype(jnp.int32)


def _filter(logits: jax.Array, params: SamplingBatch) -> jax.Array:
    """logits f32[B, V] with -inf where top-k, then top-p of what is left, or min-p drops a token;
    rows that ask for none of them keep their bits. No filter drops the likeliest token or its
    equals, even where a top-p or min-p is so small that its product here becomes 0."""
    vocab = logits.shape[1]
    keys = _sortable(logits)
    k = jnp.where(params.top_k > 0, jnp.minimum(params.top_k, vocab), vocab)
    kept = keys >= _threshold(lambda t: jnp.sum(keys >= t, axis=1) >= k, keys)
    probs = jnp.where(kept, jax.nn.softmax(logits, axis=-1), 0.0)
    goal = params.top_p * probs.sum(axis=1)
    threshold = _threshold(lambda t: jnp.sum(probs * (keys >= t), axis=1) >= goal, keys)
    # A goal of 0 is reached by no token at all.
    top_p = keys >= jnp.minimum(threshold, keys.max(axis=1, keepdims=True))
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


def report(logits: jax.Array, tokens: jax.Array, n: int) -> Logprobs:
    """Log-probabilities of tokens i32[B] under logits f32[B, V], and of the n likeliest."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    values, ids = lax.top_k(logprobs, n)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]
    return Logprobs(chosen, ids.astype(jnp.int32), values)
