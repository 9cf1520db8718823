"""Steps of chunks and rows together, on an engine that has programs for both."""

from collections.abc import Iterator

import jax
import numpy as np

from pdjax.core.kv_layout import split_groups
from pdjax.core.model_spec import ModelSpec
from pdjax.device.kept.ahead import Call
from pdjax.device.kv.pool import PoolOwner
from pdjax.device.models.decoder import Params
from pdjax.device.programs.decode import DecodeProgram
from pdjax.device.programs.prefill import PrefillProgram
from pdjax.device.programs.program import AfterGroup
from pdjax.device.programs.sampled import BothTickets, nothing_sampled
from pdjax.device.sharing import rehearsals, shapes_of
from pdjax.device.steps import decode, mixed, prefill
from pdjax.device.steps.sample import Undecided
from pdjax.interfaces.batches import IDLE_ROW, Sampled
from pdjax.interfaces.steps import MixedStep, StepKind
from pdjax.interfaces.tickets import Ticket


class MixedProgram:
    """Mixed steps; see `Program`. What lives on the devices from step to step is the decode
    program's. Both programs choose the tokens of their part.

    Args:
      chunks, rows: the programs of the engine's other steps.
      params, spec, pool: theirs.
      attention: as of `DecodeProgram`.
    """

    kind = StepKind.MIXED
    rows = 0
    losses = 0  # the decode program counts them

    def __init__(
        self,
        chunks: PrefillProgram,
        rows: DecodeProgram,
        params: Params,
        spec: ModelSpec,
        pool: PoolOwner,
        *,
        attention: str | None,
    ) -> None:
        self.layer_groups = split_groups(spec.num_layers, 1)
        self._chunks, self._rows = chunks, rows
        self._params: Params | None = params
        self._pool, self._vocab_size = pool, spec.vocab_size
        step = mixed.make_mixed_step(params, spec, pool.layout, attention=attention)
        self._step = step.over(2)

    def dispatch(self, step: MixedStep, after_group: AfterGroup) -> Ticket[Sampled]:
        if step.chunks.kv_lens.any() or (step.rows.positions != IDLE_ROW).any():
            return self._dispatch(step, after_group)
        known = rehearsals(self._step.program)
        sizes = len(step.chunks.kv_lens), *step.rows.page_table.shape
        shapes = shapes_of(
            self._params, self._pool.arrays, step.chunks.tokens, step.chunks.kv_pages
        )
        if (sizes, shapes) in known:
            after_group(0)
            return nothing_sampled(sizes[0] + sizes[2], self._rows.max_logprobs)
        ticket = self._dispatch(step, after_group)
        known.add((sizes, shapes))
        return ticket

    def _dispatch(self, step: MixedStep, after_group: AfterGroup) -> BothTickets:
        rows = self._rows
        with rows.donated():
            size = rows.size(len(step.rows.tokens))
            self._chunks.copy(step.copies, step.chunks)
            self._pool.arrays, size.undecided, undecided, x = self._step(
                self._params,
                self._pool.arrays,
                size.undecided,
                rows.fed_back,
                prefill.pack(step.chunks),
                decode.pack(step.rows),
            )
            of_rows = rows.choose(step.rows)
        after_group(0)
        return BothTickets(self._chunks.choose(step.chunks, undecided, x), of_rows)

    def calls(self, step: MixedStep) -> Iterator[Call]:
        n, chunks = len(step.rows.tokens), self._chunks
        undecided = Undecided.shapes(n, self._vocab_size)
        packed = prefill.pack(step.chunks), decode.pack(step.rows)
        yield from chunks.calls_to_copy(step.copies, step.chunks)
        state = self._pool.arrays, undecided, self._rows.fed_back
        yield self._step.program, (self._params, *state, *packed)
        yield from chunks.calls_to_choose(step.chunks, chunks.stream_of(step.chunks))

    def feed(self, row: int, tokens: jax.Array | np.ndarray, index: int) -> None:
        raise ValueError(f"row={row}: the rows are the decode program's")

    def set_history(self, row: int, token_ids: np.ndarray) -> None:
        raise ValueError(f"row={row}: the rows are the decode program's")

    def close(self) -> None:
        self._params = None
