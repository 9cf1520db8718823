"""What a policy sees of an engine."""

from collections.abc import Callable
from dataclasses import dataclass, field

from pdjax.core.ids import EngineId, PoolId
from pdjax.core.roles import Role
from pdjax.host.batching.buckets import Buckets
from pdjax.host.sequences.sequence import Sequence
from pdjax.host.step_times import StepTimes
from pdjax.interfaces.steps import StepKind


@dataclass(frozen=True, slots=True)
class EngineView:
    """An engine, as a policy sees it.

    Attributes:
      engine: its name. `pool`: the pool of its pages.
      accepts: the steps that it may be given. `role`: the new work that it is given.
      buckets: the sizes of its steps and pages.
      open: whether it takes another step now.
      running: its sequences with prompt tokens still to dispatch, oldest first.
      backlog: prompt tokens that it has been given and has not finished: the measure of its load.
      steps: prefill steps that it has been given so far; `in_flight`: those that have not come
        back.
      beside_rows: most prompt tokens of its next step, where rows decode in the same step; None
        where none do, and `buckets` say how many.
      rows: decode rows, all of them; `free_rows`: those that are free.
      free_pages: pages of the pool that may be reserved now; 0 for a prefill policy where the
        engine goes on with its prompts and is given no others. `total_pages`: all that it will
        have.
      leaving_pages: pages of the pool that hand-offs hold until their KV has arrived elsewhere.
      rows_of_pool: decode rows that are taken, over all engines of the pool.
      free_rows_of_pool: those that are free; None where no engine of the pool decodes.
      cached: of a sequence that waits, the tokens at its front whose KV is in the pool already.
      sources: the pools from which KV can come to this one, its own included.
      prefill_times: what its prefill steps take by their tokens.
      token_times: what its rows wait for each token, by how many rows are active: a tick for each
        stage.
      tick_times, chunk_times: of an engine that accepts mixed steps, what ticks without chunks take
        by their rows, and what chunks add to that in mixed steps, by their tokens.
      takes_prompts: for a prefill policy, whether prompts that wait may be given to it, or it only
        goes on with those that it has.
      tpot: the least seconds between two tokens that any of its rows asks for by its SLO; None
        where none does.
    """

    engine: EngineId
    pool: PoolId
    accepts: frozenset[StepKind]
    buckets: Buckets
    open: bool
    running: tuple[Sequence, ...]
    backlog: int
    steps: int
    rows: int
    free_rows: int
    free_pages: int
    total_pages: int
    rows_of_pool: int
    cached: Callable[[Sequence], int]
    sources: frozenset[PoolId]
    in_flight: int = 0
    leaving_pages: int = 0
    prefill_times: StepTimes = field(default_factory=StepTimes)
    token_times: StepTimes = field(default_factory=StepTimes)
    beside_rows: int | None = None
    role: Role = Role.MIXED
    tick_times: StepTimes = field(default_factory=StepTimes)
    chunk_times: StepTimes = field(default_factory=StepTimes)
    tpot: float | None = None
    takes_prompts: bool = True
    free_rows_of_pool: int | None = None

    @property
    def token_budget(self) -> int:
        """Most prompt tokens of its next step."""
        return self.buckets.token_budget if self.beside_rows is None else self.beside_rows
