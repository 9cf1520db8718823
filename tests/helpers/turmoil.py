"""Random days on which plans are overtaken: between the layer groups of a step something that a
plan for another engine was made upon goes."""

from dataclasses import replace

from pdjax.config import HandoffConfig
from pdjax.host.engines import PrefillLane
from pdjax.host.sequences.lifecycle import Progress
from pdjax.host.sequences.sequence import State
from tests.helpers.workload import Workload

MOST_EVENTS = 60
"""Events a workload: whoever is preempted for ever never ends."""


class Turmoil(Workload):
    """A workload whose sequences are preempted, and whose cached and free pages are lost, in the
    middle of a step. That is no fault: all tokens must come, and be right."""

    def __init__(self, seed: int, *, faults: bool = False) -> None:
        self._taken: list[tuple[PrefillLane, list[int]]] = []
        self._events = 0
        super().__init__(seed, faults=faults)
        self._serve = self.coordinator._between_groups
        self.coordinator._prefilling._between = self._between_groups

    def _handoff_config(self) -> HandoffConfig:
        config = super()._handoff_config()
        self.prefix_cache = self.random.random() < 0.8
        return replace(config, give_back=self.prefix_cache)

    def _between_groups(self) -> None:
        self._serve()
        if self._events < MOST_EVENTS and self.random.random() < 0.5:
            self._events += 1
            self.random.choice((self._preempt, self._lose, self._take))()

    def _preempt(self) -> None:
        states = (State.PREFILLING, State.PREFILLED, State.TRANSFERRING, State.DECODING)
        sequences = [seq for visit in self.visits for seq in visit.sequences]
        able = [seq for seq in sequences if seq.state in states]
        if able:
            self.coordinator._roster.preempt(self.random.choice(able))
            self.happened["preempted between layer groups"] += 1

    def _lose(self) -> None:
        """Cached pages are evicted, as by an allocation."""
        lane = self.random.choice(self.coordinator._prefill)
        prefixes = lane.pool.prefixes
        if prefixes is not None and lane.allocator.cached_pages:
            for page in self.random.choices(list(lane.allocator._cached), k=3):
                prefixes.forget(page)
            self.happened["lost between layer groups"] += 1

    def _take(self) -> None:
        """Free pages are taken until the step has ended."""
        lane = self.random.choice(self.coordinator._prefill)
        pages = lane.allocator.allocate(self.random.randint(0, lane.allocator.free_pages))
        self._taken.append((lane, pages))
        self.happened["taken between layer groups"] += bool(pages)

    def _step(self) -> list[Progress]:
        news = super()._step()
        taken, self._taken = self._taken, []
        for lane, pages in taken:
            lane.allocator.free(pages)
        return news
