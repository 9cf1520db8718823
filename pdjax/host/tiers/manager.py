"""Tiers below the pools of engines: what these evict goes down, and what a prompt needs comes up.

A tier is a pool that no engine has, with pages of the same size and type as theirs, so that KV is
the same bit for bit. What is evicted is read in its turn, before whatever is written to its pages
next: so an allocation never waits for a tier, and what finds no room on the way is lost to it, not
to any sequence. A tier keeps what it has brought up, so that a page goes down once.

A sequence of the queue whose prefix goes on in a tier is LOADING while that comes up, and is back
at its place in the queue then. It finds its KV in the prefix index of the pool, or what is missing
is computed.
"""

from collections.abc import Iterable, Iterator
from functools import cache, partial
from itertools import islice
from weakref import WeakKeyDictionary

from pdjax.config import Config
from pdjax.core.ids import EngineId, PoolId
from pdjax.core.messages import shown
from pdjax.host.fleet import Fleet
from pdjax.host.handoff.spans import Spans
from pdjax.host.kv.pools import PoolState
from pdjax.host.policies.api import EngineView, Policies
from pdjax.host.policies.check import BadPlan, choose
from pdjax.host.policies.tiering_api import LoadChoice
from pdjax.host.runtime import Runtime
from pdjax.host.sequences.lifecycle import SequenceLifecycle
from pdjax.host.sequences.sequence import Sequence
from pdjax.host.step_times import StepTimes, prefill_seconds
from pdjax.host.tiers.account import TierTotals
from pdjax.host.tiers.found import Found, find, index_of
from pdjax.host.tiers.load import Load
from pdjax.host.tiers.moves import Move, Moves
from pdjax.host.tiers.unsaved import Unsaved
from pdjax.interfaces.events import Event, JobArrived, JobWritten
from pdjax.interfaces.transport import KeptPage, LostPages, Transport

_MOST_LOOKED = 8
"""Sequences of the queue that are looked for in tiers: those that are prefilled next."""


class TierManager:
    """What moves between the pools of engines and their tiers.

    Args:
      config: bounds of bytes and time.
      fleet: engines and pools. A pool has the first tier behind it that is connected to it in both
        directions and has pages of its size and type; so a tier may have one itself.
      transport: moves the bytes.
      lifecycle: is told of sequences that wait for a tier.
      policies: tiering says what comes up, and the router where to.
      max_model_len: tokens of the longest sequence.
      numbers: ids for jobs, unique over all that the transport is given.
      runtime: events, clock and recorder.

    Attributes:
      tiers: of each pool that has one; `totals`: of each tier.
      spans: the spans between two pools.
    """

    def __init__(
        self,
        config: Config,
        fleet: Fleet,
        transport: Transport,
        lifecycle: SequenceLifecycle,
        policies: Policies,
        max_model_len: int,
        numbers: Iterable[int],
        runtime: Runtime,
    ) -> None:
        self._fleet, self._lifecycle, self._policies = fleet, lifecycle, policies
        self._clock = runtime.clock

        @cache
        def spans(source: PoolState, target: PoolState) -> Spans:
            return Spans.between(source.layout, target.layout, max_model_len)

        self.spans = spans
        bounds = config.tiers.bytes_in_flight, config.handoff.deadline
        self.moves = Moves(transport, runtime, numbers, spans, *bounds, self._ended)
        self.tiers: dict[PoolId, PoolState] = {}
        self.totals: dict[PoolId, TierTotals] = {}
        self._loads: list[Load] = []
        self._unsaved: dict[PoolId, Unsaved] = {}
        self._times: dict[tuple[PoolId, PoolId], StepTimes] = {}
        # In which epoch a sequence was asked about, and in which one about lower tiers.
        self._asked: WeakKeyDictionary[Sequence, int] = WeakKeyDictionary()
        self._asked_below: WeakKeyDictionary[Sequence, int] = WeakKeyDictionary()
        self._coming: dict[tuple[PoolId, bytes], bool] = {}  # keys on their way; if still right
        for pool in fleet.pools.values():
            tier = self._tier_of(pool, transport)
            if tier is not None:
                self._join(pool, tier)

    def _tier_of(self, pool: PoolState, transport: Transport) -> PoolState | None:
        pools = list(self._fleet.pools.values())
        for tier in pools[pools.index(pool) + 1 :]:
            mine, its = pool.layout, tier.layout
            if self._fleet.sharing(tier) or tier.prefixes is None:
                continue
            alike = (mine.page_size, mine.dtype) == (its.page_size, its.dtype)
            both = (pool.id, tier.id), (tier.id, pool.id)
            if alike and all(transport.connects(*ends) for ends in both):
                return tier
        return None

    def _join(self, pool: PoolState, tier: PoolState) -> None:
        index = index_of(pool)
        index.on_evict(partial(self._take_in, pool, tier))
        index.on_forget(partial(self._forget, tier))
        self._unsaved[pool.id] = Unsaved(pool, index)
        self.tiers[pool.id] = tier
        self.totals.setdefault(tier.id, TierTotals())
        self._times[tier.id, pool.id] = StepTimes()

    # Down.

    def _take_in(self, pool: PoolState, tier: PoolState, evicted: list[KeptPage]) -> None:
        """A pool evicts pages, whose content is read before anything else is written there."""
        totals, there = self.totals[tier.id], list[int]()
        new: list[KeptPage] = []
        for each in sorted(evicted, key=_place):
            page = index_of(tier).page_of(each.key)
            if page is not None:
                there.append(page)
            elif (tier.id, each.key) not in self._coming:
                new.append(each)
        tier.allocator.share(there)
        taken = min(len(new), self.moves.room(pool, tier), tier.allocator.free_pages)
        totals.refreshed_pages += len(there)
        totals.refused_pages += len(new) - taken
        most = self.moves.most(pool, tier)
        for start in range(0, taken, most):
            self._send_down(pool, tier, new[start : min(start + most, taken)])
        tier.allocator.free(there)

    def _send_down(self, pool: PoolState, tier: PoolState, pages: list[KeptPage]) -> None:
        self._coming.update(((tier.id, each.key), True) for each in pages)
        self.moves.send(pool, tier, pages, tier.allocator.allocate(len(pages)), None)

    def write_ahead(self) -> None:
        """Let cached pages go down before they are evicted, those that were let go longest ago
        first: of pools of which few pages are free, a move at a time."""
        for name, tier in self.tiers.items():
            pool, unsaved = self._fleet.pools[name], self._unsaved[name]
            if not unsaved.pressing or self.moves.bytes_between(pool, tier):
                continue
            most = min(self.moves.most(pool, tier), tier.allocator.free_pages)
            if found := unsaved.take(most, partial(self._lacks, tier)):
                self._send_down(pool, tier, sorted(found, key=_place))

    def _lacks(self, tier: PoolState, key: bytes) -> bool:
        return index_of(tier).page_of(key) is None and (tier.id, key) not in self._coming

    def _forget(self, tier: PoolState, key: bytes) -> None:
        """A page of a key did not hold what it was said to; nor does what went down of it."""
        if (tier.id, key) in self._coming:
            self._coming[tier.id, key] = False
        index_of(tier).forget_key(key)
        for load in list(self._loads):
            if (
                load.tier is tier
                and not load.closed
                and any(each.key == key for each in load.pages)
            ):
                self._give_up(load)

    def _went_down(self, move: Move, error: BaseException | None) -> None:
        tier, totals = move.target, self.totals[move.target.id]
        right = {each.key: self._coming.pop((tier.id, each.key)) for each in move.pages}
        if error is None:
            index_of(tier).keep(each for each in move.arrived if right[each.key])
            totals.down_pages += len(move.pages)
            totals.down_bytes += move.nbytes
        else:
            totals.failed_pages += len(move.pages)
        tier.allocator.free(move.target_pages)

    # Up.

    def look(self) -> bool:
        """Let the sequences wait whose KV comes up from a tier, of those that are prefilled next.
        Returns whether there are any."""
        if not self.tiers or not self._lifecycle.waiting:
            return False
        states = (each for each in self._fleet.for_prompts if each.pool.id in self.tiers)
        views, ahead, begun = self._fleet.prompt_views(states), 0, False
        for sequence in list(islice(self._lifecycle.waiting, _MOST_LOOKED)) if views else ():
            if self._asked.get(sequence) != sequence.epoch and self._look_for(
                sequence, views, ahead
            ):
                begun = True
            else:
                ahead += sequence.length
        return begun

    def _look_for(self, sequence: Sequence, views: list[EngineView], ahead: int) -> bool:
        """Begin to bring up what a tier has of a sequence, if the pool has room for all of it
        beside `ahead` tokens of those before it. Returns whether anything comes."""
        owed = {view.pool: ahead for view in views}
        for load in self._loads:
            if load.target.id in owed:
                owed[load.target.id] += load.sequence.length
        able = [
            view
            for view in views
            if sequence.length + owed[view.pool] <= view.free_pages * view.buckets.page_size
        ]
        deep = self._asked_below.get(sequence) != sequence.epoch
        found: dict[EngineId, Found] = {}
        for view in able:
            one = find(sequence, self._fleet.pools[view.pool], self.tiers, deep=deep)
            if one is not None:
                found[view.engine] = one
        able = [view for view in able if view.engine in found]
        if not able:
            return False
        view = choose(self._policies.router, "prefill_engine", sequence, able)
        self._asked[sequence] = sequence.epoch
        choice = self._choice(sequence, view, found[view.engine])
        policy, now = self._policies.tiering, self._clock.now()
        answer = policy.loads(choice, now)
        if not isinstance(answer, bool):
            raise BadPlan(
                f"policy {type(policy).__name__}: loads of {sequence.id}={shown(answer)}: must be "
                "True or False"
            )
        if not answer:
            self.totals[choice.tier].recomputed_tokens += choice.tokens
            return False
        self._begin(sequence, found[view.engine])
        return True

    def _choice(self, sequence: Sequence, view: EngineView, found: Found) -> LoadChoice:
        size, nbytes = found.target.layout.page_size, found.target.layout.page_bytes
        tokens, parts = found.run * size, [self._seconds(*way) for way in found.ways]
        known = [part for part in parts if part is not None]
        return LoadChoice(
            sequence=sequence,
            engine=view.engine,
            tier=found.tier.id,
            tokens=tokens,
            nbytes=found.run * nbytes,
            load_seconds=sum(known) if len(known) == len(parts) else None,
            compute_seconds=prefill_seconds(view.prefill_times, view.buckets.token_budget, tokens),
        )

    def _seconds(self, tier: PoolState, target: PoolState, pages: int) -> float | None:
        """Until so many pages have moved, with what is on the same way before them."""
        ahead = (load for load in self._loads if load.tier is tier and load.target is target)
        pages += sum(load.unsent for load in ahead)
        nbytes = pages * tier.layout.page_bytes + self.moves.bytes_between(tier, target)
        return self._times[tier.id, target.id].seconds(nbytes)

    def _begin(self, sequence: Sequence, found: Found) -> None:
        tier, target, pages = found.tier, found.target, found.pages
        # First both ends are held: to allocate may evict, here and in the tier.
        target.allocator.share(found.there)
        tier.allocator.share([each.page for each in pages])
        room = target.allocator.allocate(len(pages))
        load = Load(sequence, tier, target, found.there, pages, room, self._drop_moves_of)
        self._loads.append(load)
        if self._fleet.sharing(target):
            sequence.brought_to = target.id
        self._lifecycle.start_loading(sequence, load)

    def pump(self) -> None:
        """Let leave what may be on the way, of the oldest load first. Whatever ends or is dropped
        makes room there, so that this is asked in every turn."""
        if not self._loads:
            return
        self._loads = [load for load in self._loads if not load.closed]
        full = set[tuple[PoolId, PoolId]]()
        for load in list(self._loads):
            way = load.tier.id, load.target.id
            most = self.moves.most(load.tier, load.target)
            while load.unsent and way not in full:
                count = min(load.unsent, most)
                if count > self.moves.room(load.tier, load.target):
                    full.add(way)
                    break
                part = slice(load.sent, load.sent + count)
                load.sent += count
                pages, to = load.pages[part], load.target_pages[part]
                self.moves.send(load.tier, load.target, pages, to, load)

    def _came_up(self, move: Move, error: BaseException | None) -> None:
        load: Load = move.asker
        if load.closed:
            return  # its sequence waits no longer
        totals = self.totals[load.tier.id]
        load.arrived += len(move.pages)
        if error is None:
            index_of(load.target).keep(move.arrived)
            seconds = self._clock.now() - move.sent
            self._times[load.tier.id, load.target.id].add(move.nbytes, seconds)
            totals.up_pages += len(move.pages)
            totals.up_bytes += move.nbytes
            totals.hit_tokens += len(move.pages) * load.target.layout.page_size
        else:
            load.failed = True
            totals.failed_pages += len(move.pages)
            for page in error.pages if isinstance(error, LostPages) else ():
                index_of(load.tier).forget(page)
        if load.failed:
            self._give_up(load)
        elif load.arrived == len(load.pages):
            self._finish(load)

    def _finish(self, load: Load) -> None:
        load.close()
        if not self._fleet.sharing(load.target):  # it has come half of its way
            self._asked.pop(load.sequence, None)
            self._asked_below[load.sequence] = load.sequence.epoch
        self._lifecycle.end_loading(load.sequence)

    def _give_up(self, load: Load) -> None:
        """Let what is missing be computed."""
        self.totals[load.tier.id].failed_loads += 1
        self._finish(load)

    def _drop_moves_of(self, load: Load) -> None:
        for move in self.moves.under_way:
            if move.asker is load and move.writing is None:
                self.moves.drop(move)

    # Both.

    def _ended(self, move: Move, error: BaseException | None) -> None:
        if move.asker is None:
            self._went_down(move, error)
        else:
            self._came_up(move, error)

    def take(self, events: Iterable[Event]) -> None:
        """See to what has happened to moves. The losses of pools have been noticed."""
        if not self.tiers:
            return
        for event in events:
            match event:
                case JobArrived(job_id):
                    self.moves.job_arrived(job_id)
                case JobWritten(job_id):
                    self.moves.job_written(job_id)

    def pool_lost(self, pool: PoolState) -> None:
        """A pool of engines has lost its content: what had not left it has not been read, and what
        was to come there has nowhere to go."""
        for load in self._loads:
            if load.target is pool and not load.closed:
                self._give_up(load)
        for move in self.moves.under_way:
            if move.source is pool and move.writing is None:
                self.moves.drop(move)
                self._went_down(move, ConnectionResetError(f"{pool.id} was lost"))

    @property
    def busy(self) -> bool:
        """Whether anything is on its way."""
        return bool(self.moves.under_way)

    def sizes(self) -> Iterator[tuple[PoolState, PoolState, tuple[int, ...]]]:
        """Between which pools pages move, and the padded sizes of moves in pages."""
        for name, tier in self.tiers.items():
            pool = self._fleet.pools[name]
            for ends in ((pool, tier), (tier, pool)):
                most = self.moves.most(*ends)
                buckets = self.moves.spans_of(*ends).buckets
                yield *ends, tuple(size for size in buckets if size <= most)

    def held(self) -> Iterator[tuple[PoolState, list[int]]]:
        """The pages that are held by what is on its way, by pool."""
        for move in self.moves.under_way:
            if move.asker is None:
                yield move.target, move.target_pages
        for load in self._loads:
            yield from load.held()


def _place(page: KeptPage) -> int:
    return page.place
