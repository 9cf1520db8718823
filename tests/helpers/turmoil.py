"""Random days on which plans are overtaken: before a step is dispatched, something that its plan
was made upon goes."""

from dataclasses import replace

from pdjax.config import HandoffConfig
from pdjax.host.batching.chunks import Chunk
from pdjax.host.engines import EngineState
from pdjax.host.kv.pages import PageAllocator
from pdjax.host.sequences.news import Progress
from pdjax.host.sequences.sequence import State
from tests.helpers.workload import Workload

MOST_EVENTS = 60
"""Events a workload: a sequence that is preempted for ever never ends."""


class Turmoil(Workload):
    """A workload whose sequences are preempted, and whose cached and free pages are lost, between a
    plan and its steps. That is no fault: all tokens must come, and be right."""

    def __init__(self, seed: int, *, faults: bool = False) -> None:
        self._taken: list[tuple[PageAllocator, list[int]]] = []
        self._events = 0
        super().__init__(seed, faults=faults)

    def _handoff_config(self) -> HandoffConfig:
        config = super()._handoff_config()
        self.prefix_cache = self.random.random() < 0.8
        return replace(config, give_back=self.prefix_cache)

    def _step(self) -> list[Progress]:
        self._disturb_dispatch()
        news = super()._step()
        taken, self._taken = self._taken, []
        known = {pool.allocator for pool in self.coordinator.loop.fleet.pools.values()}
        for allocator, pages in taken:
            if allocator in known:  # else the turn was broken off, and all pages are free
                allocator.free(pages)
        return news

    def _disturb_dispatch(self) -> None:
        runner = self.coordinator.loop._prefill
        dispatch = type(runner).dispatch

        def disturbed(state: EngineState, chunks: tuple[Chunk, ...]) -> None:
            if self._events < MOST_EVENTS and self.random.random() < 0.5:
                self._events += 1
                self.random.choice((self._preempt, self._lose, self._take))()
            dispatch(runner, state, chunks)

        runner.dispatch = disturbed  # type: ignore[method-assign]

    def _preempt(self) -> None:
        states = (State.PREFILLING, State.PREFILLED, State.TRANSFERRING, State.DECODING)
        sequences = [seq for visit in self.visits for seq in visit.sequences]
        able = [seq for seq in sequences if seq.state in states]
        if able:
            self.coordinator.loop.lifecycle.preempt(self.random.choice(able))
            self.happened["preempted before a step"] += 1

    def _lose(self) -> None:
        """Cached pages are evicted, as by an allocation."""
        pool = self.random.choice(self.coordinator.loop.fleet.prefill).pool
        if pool.prefixes is not None and pool.allocator.cached_pages:
            for page in self.random.choices(list(pool.allocator._cached), k=3):
                pool.prefixes.forget(page)
            self.happened["lost before a step"] += 1

    def _take(self) -> None:
        """Free pages are taken until the turn has ended."""
        allocator = self.random.choice(self.coordinator.loop.fleet.prefill).allocator
        pages = allocator.allocate(self.random.randint(0, allocator.free_pages))
        self._taken.append((allocator, pages))
        self.happened["taken before a step"] += bool(pages)
