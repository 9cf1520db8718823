"""All engines and pools of a deployment, and which of them events have touched.

The host looks only at engines that something has happened to: a step that came back, pages or rows
that were taken or let go, a sequence that joined or left. So a turn costs what has happened in it,
however many engines there are.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import partial

from pdjax.config import Config
from pdjax.core.ids import EngineId, PoolId
from pdjax.host.batching.buckets import Buckets
from pdjax.host.batching.decode_pipeline import DecodePipeline
from pdjax.host.engines import EngineState, view_of
from pdjax.host.kv.eviction import MakeOrder
from pdjax.host.kv.pools import PoolState
from pdjax.host.policies.api import EngineView
from pdjax.host.service import Service, services_of
from pdjax.interfaces.engine import Engine
from pdjax.interfaces.steps import StepKind
from pdjax.interfaces.transport import Pool, Transport

Touched = set[EngineState]
"""Engines that something has happened to."""


def in_order(touched: Collection[EngineState]) -> list[EngineState]:
    """Engines in the order of the fleet."""
    return list(touched) if len(touched) < 2 else sorted(touched, key=_index)


class Fleet:
    """The engines and pools, as the host keeps them.

    Args:
      engines: at least one that accepts prefill steps and one that accepts decode steps. Those that
        name the same pool share it.
      transport: says between which pools KV can move.
      config: budgets, lookahead and buckets.
      max_model_len: tokens of the longest sequence.
      pools: that no engine has.
      services: what each engine is given to do; None lets each do all that it accepts.
      orders: makes the order in which the cached pages of a pool are evicted; None keeps no
        prefixes.

    Attributes:
      engines: all of them, by name; `prefill` and `decode` those that accept such steps.
      pools: by name.
      to_tick, to_plan: engines that have been touched since the loop last looked for ticks to
        dispatch, and for prefill steps to plan.
      to_admit: engines whose pages or rows have changed since it last looked for sequences to hand
        over.
      newly_measured: whether an engine has been measured for the first time since the admission
        policy was last asked.

    Raises:
      ValueError: two engines or pools of one name, no engine of a kind, or pools that cannot hold
        the same KV.
    """

    def __init__(
        self,
        engines: Seq[Engine],
        transport: Transport,
        config: Config,
        max_model_len: int,
        pools: Seq[Pool] = (),
        services: Mapping[EngineId, Service] | None = None,
        orders: MakeOrder | None = None,
    ) -> None:
        self._orders, self._pinned_fraction = orders, config.kv.pinned_fraction
        self._longest = max_model_len
        self.pools: dict[PoolId, PoolState] = {}
        self.engines: dict[EngineId, EngineState] = {}
        self.to_tick, self.to_plan, self.to_admit = Touched(), Touched(), Touched()
        self.newly_measured = False
        self._sharing: dict[PoolId, list[EngineState]] = {}
        for engine in engines:
            if engine.pool in self.pools:
                self._check_shared(engine)
            else:
                own = Pool(engine.pool, engine.layout, engine.num_pages)
                self._add_pool(own)
        for pool in pools:
            if pool.id in self.pools:
                raise ValueError(f"pools: two are called {pool.id}; names must differ")
            self._add_pool(pool)
        self._services = services_of(engines) if services is None else services
        for index, engine in enumerate(engines):
            self._add_engine(index, engine, transport, config, max_model_len)
        self.prefill = [state for state in self if StepKind.PREFILL in state.engine.accepts]
        self.decode = [state for state in self if StepKind.DECODE in state.engine.accepts]
        for kind, able, given in (
            (StepKind.PREFILL, self.prefill, [state.role.prefills for state in self.prefill]),
            (StepKind.DECODE, self.decode, [state.role.decodes for state in self.decode]),
        ):
            if not able:
                raise ValueError(f"engines: none accepts {kind.value} steps; one must")
            if not any(given):
                raise ValueError(f"roles: no engine is given {kind.value} work; one must be")

    def __iter__(self) -> Iterator[EngineState]:
        return iter(self.engines.values())

    def _check_shared(self, engine: Engine) -> None:
        pool = self.pools[engine.pool]
        mine, theirs = (pool.layout, pool.allocator.total + 1), (engine.layout, engine.num_pages)
        if mine != theirs:
            raise ValueError(
                f"{engine.id}: layout and pages {theirs} of pool {engine.pool}, for which another "
                f"engine has {mine}; engines that share a pool must agree"
            )

    def _add_pool(self, new: Pool) -> None:
        for other in self.pools.values():
            other.layout.check_same_kv(new.layout)
        order = None if self._orders is None else self._orders(new.layout)
        total = new.num_pages - 1
        beside = total - new.layout.pages_for(self._longest)
        most_pinned = max(0, min(int(total * self._pinned_fraction), beside))
        pool = PoolState.of(new.id, new.layout, new.num_pages, order, most_pinned, new.kept)
        self.pools[new.id] = pool
        self._sharing[new.id] = []
        pool.allocator.on_change(partial(self._room_changed, self._sharing[new.id]))

    def _add_engine(
        self,
        index: int,
        engine: Engine,
        transport: Transport,
        config: Config,
        max_model_len: int,
    ) -> None:
        if engine.id in self.engines:
            raise ValueError(f"engines: two are called {engine.id}; names must differ")
        sharing = self._sharing[engine.pool]
        prefills, decodes = (kind in engine.accepts for kind in (StepKind.PREFILL, StepKind.DECODE))
        buckets = Buckets.of(
            config.prefill if prefills else None,
            config.decode if decodes else None,
            engine.layout.page_size,
            max_model_len,
        )
        rows = None
        if decodes:
            on_change = partial(self._room_changed, sharing)
            rows = DecodePipeline(engine.layout.stages, engine.rows, buckets, on_change)
        state = EngineState(
            index=index,
            engine=engine,
            service=self._services[engine.id],
            pool=self.pools[engine.pool],
            buckets=buckets,
            pipeline=rows,
            sources=frozenset(
                pool
                for pool in self.pools
                if pool == engine.pool or transport.connects(pool, engine.pool)
            ),
            prefill_lookahead=config.prefill.lookahead,
            decode_lookahead=config.decode.lookahead,
            losses=engine.losses,
        )
        self.engines[engine.id] = state
        sharing.append(state)
        self._room_changed([state])

    # What has happened.

    def touch(self, state: EngineState) -> None:
        """Something has happened to an engine."""
        state.view = None
        if state.pipeline is not None:
            self.to_tick.add(state)
        if state.prefills:
            self.to_plan.add(state)

    def stepped(self, state: EngineState) -> None:
        """A step has been dispatched to an engine, or has come back: it is looked at again if it
        takes another. Where only ticks do, a policy would see nothing new."""
        if state.prefills:
            state.view = None
            if state.takes_prefill:
                self.to_plan.add(state)
        if state.takes_tick:
            self.to_tick.add(state)

    def _room_changed(self, states: Iterable[EngineState]) -> None:
        """Pages or rows of a pool have been taken or let go."""
        for state in states:
            self.touch(state)
            if state.pipeline is not None:
                self.to_admit.add(state)

    @property
    def touched(self) -> bool:
        """Whether the loop has not looked yet at all that has happened."""
        return bool(self.to_tick or self.to_plan or self.to_admit)

    # What is known.

    def views(self, states: Iterable[EngineState]) -> list[EngineView]:
        """What a policy sees of some engines; of each the same object until something happens to
        it."""
        return [state.view or self._look_at(state) for state in states]

    def prompt_views(
        self, states: Iterable[EngineState], *, local: bool = False
    ) -> list[EngineView]:
        """What a prefill policy sees of some engines: where one is given no prompts no page may be
        reserved.

        Args:
          local: whether engines that are for decode are given prompts, too.
        """
        return [
            view
            if state.takes_prompts or (local and state.takes_rows)
            else replace(view, free_pages=0, takes_prompts=False)
            for state in states
            for view in (state.view or self._look_at(state),)
        ]

    @property
    def for_prompts(self) -> list[EngineState]:
        """The engines that are given prompts."""
        return [state for state in self.prefill if state.takes_prompts]

    @property
    def for_rows(self) -> list[EngineState]:
        """The engines that are given sequences to decode."""
        return [state for state in self.decode if state.takes_rows]

    def longest(self, *, local: bool) -> tuple[int, int]:
        """Tokens of the largest pool of an engine that is given prompts, where it is `local` also
        of one that is for decode, and of one that is given sequences to decode."""
        prompts = [state.pool.tokens for state in self.prefill if local or state.takes_prompts]
        return max(prompts), max(state.pool.tokens for state in self.for_rows)

    @property
    def longest_pinned(self) -> int | None:
        """Tokens of the longest prompt that may be pinned where engines prefill; None where no
        prefix is kept."""
        pools = [state.pool for state in self.prefill]
        most = [
            (pool.pins.most + 1) * pool.layout.page_size - 1
            for pool in pools
            if pool.pins is not None
        ]
        return max(most, default=None)

    def _look_at(self, state: EngineState) -> EngineView:
        state.view = view_of(state, self.sharing(state.pool))
        return state.view

    def sharing(self, pool: PoolState) -> list[EngineState]:
        """The engines of a pool."""
        return self._sharing[pool.id]

    def sharing_of(self, pool: PoolId) -> list[EngineState]:
        """The engines of a pool, by its name."""
        return self._sharing[pool]

    def shares(self, tokens: int) -> bool:
        """Whether a whole page of so many tokens is found again where engines prefill."""
        indices = [state.pool.prefixes for state in self.prefill]
        return any(index is not None and tokens >= index.page_size for index in indices)

    @property
    def busy(self) -> bool:
        """Whether any step is in flight."""
        return any(state.in_flight for state in self)


def _index(state: EngineState) -> int:
    return state.index
