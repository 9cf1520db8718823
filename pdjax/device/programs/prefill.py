"""Prefill steps on a tensor-parallel mesh."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from pdjax.core.kv_layout import split_groups
from pdjax.core.model_spec import ModelSpec
from pdjax.device.kept.ahead import Call
from pdjax.device.kv.pool import PoolOwner
from pdjax.device.models.decoder import Params
from pdjax.device.models.sampling import Asked, all_asked
from pdjax.device.packing import Packed
from pdjax.device.programs.program import AfterGroup
from pdjax.device.programs.sampled import SampledTicket, nothing_sampled
from pdjax.device.sharing import rehearsals, shapes_of
from pdjax.device.steps import prefill, score
from pdjax.device.steps.copy import make_copy_step
from pdjax.device.steps.copy import pack as pack_copies
from pdjax.device.steps.sample import Undecided, make_sample_step
from pdjax.interfaces.batches import PrefillBatch, Sampled
from pdjax.interfaces.steps import Copies, PrefillStep, StepKind
from pdjax.interfaces.tickets import Ticket


class PrefillProgram:
    """Prefill steps, in one piece or cut into layer groups; see `Program`.

    Args:
      params: as they lie on the pool's mesh.
      spec: the model's shapes.
      pool: that the steps write.
      max_logprobs: how many log-probabilities a row gets.
      layer_groups: programs that a step is cut into.
      copies: whether steps may copy pages.

    Raises:
      ValueError: more groups than layers.
    """

    kind = StepKind.PREFILL
    rows = 0
    losses = 0

    def __init__(
        self,
        params: Params,
        spec: ModelSpec,
        pool: PoolOwner,
        *,
        max_logprobs: int,
        layer_groups: int = 1,
        copies: bool = True,
    ) -> None:
        self.layer_groups = split_groups(spec.num_layers, layer_groups)
        self._params, self._spec, self._pool = params, spec, pool
        self._max_logprobs = min(max_logprobs, spec.vocab_size)
        self._step = prefill.make_prefill_step(params, spec, pool.layout.tp, layer_groups).over(2)
        self._copy = make_copy_step(pool).over(1) if copies else None
        self._sample = make_sample_step(pool.mesh, self._max_logprobs)
        scores = score.make_score_step(params, spec, pool.layout.tp, self._max_logprobs)
        self._score = scores.over(1)

    def cut(self, layer_groups: int) -> "PrefillProgram":
        """The same steps over the same weights and pool, in so many layer groups."""
        return PrefillProgram(
            self._params,
            self._spec,
            self._pool,
            max_logprobs=self._max_logprobs,
            layer_groups=layer_groups,
            copies=self._copy is not None,
        )

    def dispatch(self, step: PrefillStep, after_group: AfterGroup) -> Ticket[Sampled]:
        if step.batch.kv_lens.any():
            return self._dispatch(step, after_group)
        copies = None if self._copy is None else self._copy.program
        programs = self._step.program, self._sample, self._score.program, copies
        batch, known = step.batch, rehearsals(*programs)
        shapes = shapes_of(self._params, self._pool.arrays, vars(batch) | {"sampling": None})
        if shapes in known:
            for group in range(len(self.layer_groups)):
                after_group(group)
            return nothing_sampled(len(batch.kv_lens), self._max_logprobs)
        ticket = self._dispatch(step, after_group)
        known.add(shapes)
        return ticket

    def _dispatch(self, step: PrefillStep, after_group: AfterGroup) -> SampledTicket:
        with self._pool.donated():
            self.copy(step.copies, step.batch)
            undecided, x = self._compute(prefill.pack(step.batch), after_group)
        return self.choose(step.batch, undecided, x)

    def copy(self, copies: Copies, batch: PrefillBatch) -> None:
        """Copy pages before a batch is computed, within `donated`.

        Raises:
          ValueError: steps may copy no pages, or not so many.
        """
        for _, arguments in self.calls_to_copy(copies, batch):
            assert self._copy is not None, "else there is no call"
            self._pool.arrays = self._copy(*arguments)

    def calls_to_copy(self, copies: Copies, batch: PrefillBatch) -> Iterator[Call]:
        """What `copy` calls; a rehearsal copies the null page."""
        if self._copy is None:
            if copies:
                raise ValueError(f"copies: {len(copies)} given; this engine's steps copy no pages")
        elif copies or not batch.kv_lens.any():
            pages = pack_copies(copies, len(batch.kv_lens))
            yield self._copy.program, (self._pool.arrays, pages)

    def choose(self, batch: PrefillBatch, undecided: Undecided, x: jax.Array) -> SampledTicket:
        """Choose the tokens that follow, and work out the log-probabilities that are asked for, of
        a batch of which `x` [T, D] is the residual stream behind the layers."""
        for asked in self._asked(batch):
            history = batch.history if asked.variant.penalize else None
            tokens, _, choice = self._sample(undecided, None, history, asked)
        inspect, scored = self._pool.inspect, [*self._scores(x, batch)]
        return SampledTicket(choice, batch.sampling, self._max_logprobs, inspect, scored, tokens)

    def calls(self, step: PrefillStep) -> Iterator[Call]:
        batch, packed = step.batch, prefill.pack(step.batch)
        yield from self.calls_to_copy(step.copies, batch)
        x = self.stream_of(batch)
        if isinstance(self._step, prefill.GroupedPrefillStep):
            yield from self._step.calls(self._params, self._pool.arrays, packed, x)
        else:
            yield self._step.program, (self._params, self._pool.arrays, packed)
        yield from self.calls_to_choose(batch, x)

    def stream_of(self, batch: PrefillBatch) -> jax.ShapeDtypeStruct:
        """[T, D], the residual stream of a batch."""
        shape = len(batch.tokens), self._spec.model_dim
        return jax.ShapeDtypeStruct(shape, self._params.final_norm.dtype)

    def calls_to_choose(self, batch: PrefillBatch, x: jax.ShapeDtypeStruct) -> Iterator[Call]:
        """What `choose` calls."""
        undecided = Undecided.shapes(len(batch.kv_lens), self._spec.vocab_size)
        for asked in self._asked(batch):
            history = batch.history if asked.variant.penalize else None
            yield self._sample, (undecided, None, history, asked)
        for arguments in self._to_score(x, batch):
            yield self._score.program, arguments

    def _scores(self, x: jax.Array, batch: PrefillBatch) -> Iterator[score.Scored]:
        """The log-probabilities of prompts that are asked for; a rehearsal's are of nothing."""
        for arguments in self._to_score(x, batch):
            yield self._score(*arguments)

    def _to_score(self, x: Any, batch: PrefillBatch) -> Iterator[tuple[Any, ...]]:
        if batch.scored is not None or not batch.kv_lens.any():
            outer = replace(self._params, layers=[])
            for packed in score.pack(batch.scored, len(batch.tokens)):
                yield outer, x, packed

    def _compute(self, packed: Packed, after_group: AfterGroup) -> tuple[Undecided, jax.Array]:
        if isinstance(self._step, prefill.GroupedPrefillStep):
            return self._step(self._params, self._pool, packed, after_group)
        self._pool.arrays, undecided, x = self._step(self._params, self._pool.arrays, packed)
        after_group(0)
        return undecided, x

    def _asked(self, batch: PrefillBatch) -> list[Asked]:
        """How tokens are chosen; of a rehearsal, in all ways that its history allows."""
        sizes = self._spec.vocab_size, len(batch.kv_lens)
        if batch.kv_lens.any():
            return [Asked.of(batch.sampling, *sizes, batch.masks)]
        return all_asked(batch.sampling, *sizes, penalize=batch.history is not None)

    def feed(self, row: int, tokens: jax.Array | np.ndarray, index: int) -> None:
        raise ValueError(f"row={row}: a prefill step has no rows; its batch brings the tokens")

    def set_history(self, row: int, token_ids: np.ndarray) -> None:
        raise ValueError(f"row={row}: a prefill step has no rows; its batch brings the history")

    def close(self) -> None:
        self._params = replace(self._params, layers=[], final_norm=None, unembed=None, embed=None)
