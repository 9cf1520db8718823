"""First come, first served prefill: whole prompts or chunks of them, packed up to a budget."""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

from pdjax.core.ids import EngineId, PoolId
from pdjax.host.batching.chunks import Chunk
from pdjax.host.policies.api import EngineView, PolicySetup, StepPlan
from pdjax.host.policies.check import choose
from pdjax.host.sequences.sequence import Sequence


@dataclass
class _Step:
    """A step in the making, and what is left of its budgets.

    `decoding` are sequences of the engine that decode there and are not in the step yet, in the
    order of their turn. `kept` places, of one token each, are reserved for them.
    """

    view: EngineView
    tokens: int
    sequences: int
    pages: int  # that it may read, over all its sequences
    decoding: list[Sequence]
    kept: int = 0
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def has_room(self) -> bool:
        return self.tokens > 0 and self.sequences > 0

    def keep(self, places: int) -> None:
        """Keep places for `decoding`."""
        self.kept = places
        self.tokens -= places
        self.sequences -= places

    def let_decode(self, most: int) -> None:
        """Add up to `most` of `decoding`, also in the places that were kept."""
        self.tokens += self.kept
        self.sequences += self.kept
        self.kept = 0
        turn, self.decoding = self.decoding, []
        for sequence in turn:
            if most <= 0 or not self.add(sequence, sequence.prefilled):
                self.decoding.append(sequence)
            else:
                most -= 1

    def next_chunk(self, sequence: Sequence, start: int) -> Chunk:
        """As much of a sequence from `start` on as fits; perhaps nothing."""
        most = min(start + self.tokens, self.pages * self.view.buckets.page_size)
        return Chunk(sequence, start, max(start, min(sequence.length, most)))

    def add(self, sequence: Sequence, start: int) -> bool:
        """Add what fits of a sequence; returns whether anything did."""
        chunk = self.next_chunk(sequence, start)
        if not self.has_room or not chunk.tokens:
            return False
        self.chunks.append(chunk)
        self.tokens -= chunk.tokens
        self.sequences -= 1
        self.pages -= self.view.buckets.pages_for(chunk.stop)
        return True


class _Room:
    """Pages of a pool for sequences of the queue, while a plan is made; engines that share the pool
    share this."""

    __slots__ = ("pages",)

    def __init__(self, view: EngineView) -> None:
        # A page in hand for every row of the pool that decodes, see `FcfsDecode`.
        self.pages = view.free_pages - view.rows_of_pool


class _Engine:
    """An engine while a plan is made: the room left for sequences of the queue, and the step so
    far. The step is begun when it is first read, since most plans concern one engine of many."""

    __slots__ = ("_backlog", "_room", "_step", "view", "waits")

    def __init__(self, view: EngineView, room: _Room) -> None:
        self.view, self._room = view, room
        self._backlog = view.backlog
        self._step: _Step | None = None
        self.waits = False

    def put_off(self, sequence: Sequence) -> None:
        """Let the step wait if all that a sequence of the queue lacks to join it is pages that
        hand-offs are about to let go."""
        view = self.view
        needs = view.buckets.pages_for(sequence.length)
        lacks_pages = self._room.pages < needs <= self._room.pages + view.leaving_pages
        busy = view.in_flight > 0 and not view.running
        self.waits = busy and lacks_pages and self.begun and self.step.has_room

    @property
    def begun(self) -> bool:
        return self._step is not None

    @property
    def step(self) -> _Step:
        if self._step is None:
            self._step = _begin(self.view)
        return self._step

    def seen(self) -> EngineView:
        """As a router sees it."""
        view = self.view
        if (self._backlog, self._room.pages) == (view.backlog, view.free_pages):
            return view
        return replace(view, backlog=self._backlog, free_pages=self._room.pages)

    def can_admit(self, sequence: Sequence) -> bool:
        """Whether a sequence of the queue finds room."""
        buckets = self.view.buckets
        if (
            buckets.pages_for(sequence.length) > self._room.pages
            or buckets.pages_for(sequence.lifetime_tokens) > self.view.total_pages
        ):
            return False
        if not self.begun and not self.view.running:
            return True  # nothing of the step's budgets is taken, and any sequence fits into them
        if not self.step.has_room:
            return False
        # Last, since this question alone may cost a walk over the pages of the prompt.
        return self.step.next_chunk(sequence, self.view.cached(sequence)).tokens > 0

    def admit(self, sequence: Sequence) -> None:
        """Begin a sequence of the queue."""
        start = self.view.cached(sequence)
        self.step.add(sequence, start)
        self._room.pages -= self.view.buckets.pages_for(sequence.length)
        self._backlog += sequence.length - start


class FcfsPrefill:
    """Packs the oldest first, up to the engine's token budget a step (chunked prefill, Agrawal et
    al. 2023). A prompt longer than what is left of the budget is cut, and goes on in the next step.

    What is in the prefix cache of an engine's pool is not computed again there. All pages of a
    sequence are reserved when its first chunk is planned, so that what has begun can always be
    finished. If the oldest one waiting finds no room, no other overtakes it.

    A step of newcomers that could hold more of them is put off while another step runs, if all that
    they lack is pages whose KV is on its way elsewhere: a step takes as long for one prompt as for
    several, and it would leave no better room behind for the next.
    """

    def __init__(self, setup: PolicySetup) -> None:
        assert setup.router is not None, "a router chooses the engine of a sequence"
        self._router = setup.router

    def plan(self, waiting: Seq[Sequence], engines: Seq[EngineView], now: float) -> list[StepPlan]:
        """See `PrefillPolicy`."""
        rooms: dict[PoolId, _Room] = {}
        among = {
            view.engine: _Engine(view, rooms.setdefault(view.pool, _Room(view)))
            for view in engines
            if view.open
        }
        for sequence in waiting:
            able = [engine for engine in among.values() if engine.can_admit(sequence)]
            if not able:
                for engine in among.values():
                    engine.put_off(sequence)
                break
            seen = [engine.seen() for engine in able]
            view = choose(self._router, "prefill_engine", sequence, seen)
            among[view.engine].admit(sequence)
        return list(_plans(among))


def _plans(among: dict[EngineId, _Engine]) -> Iterator[StepPlan]:
    for engine, planned in among.items():
        if (planned.begun and not planned.waits) or planned.view.running:
            planned.step.let_decode(planned.view.buckets.sequences)
            if planned.step.chunks:
                yield StepPlan(engine, tuple(planned.step.chunks))


def _begin(view: EngineView) -> _Step:
    """A step that goes on with the prompts that have begun.

    Half of its places and tokens are for sequences that decode on the prefill engine, if there are
    so many; of an odd number the larger half in every second step. In those steps they also come
    first, so that neither they nor the prompts can take all pages of every step. What the others
    leave is theirs, too. The one served longest ago comes first, so that each of N is served once
    in `2 * ceil(N / max_sequences)` steps if the pages suffice, and in 2 N steps at the latest.
    """
    buckets, odd = view.buckets, view.steps % 2
    decoding = sorted(filter(_decodes, view.running), key=lambda seq: (seq.served, seq.order))
    half = (min(buckets.sequences, buckets.token_budget) + odd) // 2
    step = _Step(view, buckets.token_budget, buckets.sequences, buckets.step_pages[-1], decoding)
    if odd:
        step.let_decode(half)
    else:
        step.keep(min(half, len(decoding)))
    for sequence in view.running:
        if not _decodes(sequence):
            step.add(sequence, sequence.prefilled)
    return step


def _decodes(sequence: Sequence) -> bool:
    """Whether all that is left to compute is its newest token, which was made here."""
    return bool(sequence.output) and sequence.length - sequence.prefilled == 1
