"""A random deployment of fake engines and a random day for it, both a function of one seed."""

import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import product

from pdjax.config import (
    Config,
    DecodeConfig,
    HandoffConfig,
    KVConfig,
    PrefillConfig,
    TiersConfig,
)
from pdjax.core.clock import VirtualClock
from pdjax.core.kv_layout import KVLayout, split_groups
from pdjax.core.recompute import RecomputeCost
from pdjax.core.request import QueueFull, Request
from pdjax.core.roles import Role
from pdjax.host.coordinator import Coordinator
from pdjax.host.events import PolledEvents
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.sequences.news import Progress
from pdjax.host.sequences.sequence import LEGAL_MOVES, Sequence, State
from pdjax.interfaces.transport import Pool
from tests.helpers.drawn_params import drawn_params, drawn_prompt
from tests.helpers.drawn_policies import (
    drawn_options,
    drawn_policies,
    drawn_roles,
    starting_roles,
)
from tests.helpers.drawn_tiers import drawn_tiers
from tests.helpers.fake_engines import (
    FakeDecodeEngine,
    FakeEngine,
    FakeMixedEngine,
    FakePrefillEngine,
)
from tests.helpers.fake_guides import (
    END_TOKEN,
    SlowGuides,
    completes,
    make_guide,
)
from tests.helpers.fake_transport import FakeTransport
from tests.helpers.fakes import (
    POISON,
    STOP,
    TOP_LOGPROBS,
    Chance,
    FakePool,
    FakeText,
    InjectedInterrupt,
    expected_output,
    logprob_of,
)
from tests.helpers.scored_prompts import prompt_is_scored

MOST_STEPS = 5_000
"""Steps after which a workload that is not done hangs; it takes a few hundred."""

MOST_STEPS_TO_GIVE_UP = 200
"""Steps, of a second each, after which a job is under way for ever; it is given up after a
minute."""

FAULTS = ("Injected", "HandoffTimeout", "CorruptPages", "NoHealthyEngine")
"""What may be the reason of a failure."""

LIVE = {state for state, moves in LEGAL_MOVES.items() if moves}
REACHED = LIVE | {State.FINISHED}
"""States in which a request may be found when it is aborted."""


@dataclass
class Visit:
    """A request, when it comes, and when it loses patience."""

    request: Request
    at_step: int
    text: FakeText | None = None
    abort_in: State | None = None
    abort_at_step: int | None = None
    sequences: list[Sequence] = field(default_factory=list)


class Workload:
    """Engines, pools, limits and requests, drawn from `seed`; faults are injected if asked for."""

    tier_rate = 0.5  # of those with a prefix cache
    lower_tiers = False  # below those
    mixed_engines: tuple[int, ...] = (0, 0, 0, 0, 0, 0, 1, 2)  # how many there may be

    def __init__(self, seed: int, *, faults: bool = False) -> None:
        self._seed, self._faults = seed, faults
        self.random = random.Random(seed)
        self.chance = Chance(seed, 0.02 if faults else 0.0, self.random.choice((0, 1, 4)))
        self.happened: Counter[str] = Counter()
        self._streamed, self._finished = dict[Sequence, list[int]](), Counter[Sequence]()
        self._build()
        self.visits = [self._visit(f"r{i}") for i in range(self.random.randint(1, 12))]

    def _build(self) -> None:
        draw = self.random
        colocated = draw.random() < 0.2
        rows = draw.choice((1, 2, 3, 4, 6))
        self.layers = draw.randint(4, 6)
        page_size, other = draw.choice((1, 2, 3, 4)), 1
        if not colocated:
            other = draw.choice((1, 1, 2, 3))
        self.max_model_len = draw.randint(4, 40)
        sizes = draw.choice(((page_size, page_size * other), (page_size * other, page_size)))

        def layout(stages: int, size: int) -> KVLayout:
            return KVLayout.of_heads(self.layers, 1, 1, size, "float32", 4, stages)

        def pages(size: int, draw: random.Random = draw) -> int:
            context = -(-self.max_model_len // size)
            return 1 + draw.randint(max(1, context // 2), context + context // 2)

        stages = [n for n in (1, 2, 3, 4) if rows % n == 0]
        groups = split_groups(self.layers, draw.randint(1, 4))
        self.prefill = [
            FakePrefillEngine(
                layout(1, sizes[0]), pages(sizes[0]), self.chance, groups, name=f"prefill/{i}"
            )
            for i in range(draw.randint(1, 3))
        ]
        # Some decode engines share the pool of a prefill engine, some have their own.
        shared: list[FakePool | None] = [None] * draw.randint(1, 3)
        if colocated:
            shared = [engine.pages for engine in self.prefill]
            if draw.random() < 0.3:
                shared = [draw.choice((None, pool)) for pool in (*shared, *shared)]
        self.decode = [
            FakeDecodeEngine(
                layout(1 if pool is not None else draw.choice(stages), sizes[1]),
                pages(sizes[1]),
                rows,
                self.chance,
                name=f"decode/{i}",
                pages=pool,
            )
            for i, pool in enumerate(shared)
        ]
        apart = random.Random(f"mixed engines in {self._seed}")
        self.mixed = [
            FakeMixedEngine(
                layout(1, sizes[0]), pages(sizes[0], apart), rows, self.chance, name=f"mixed/{i}"
            )
            for i in range(apart.choice(self.mixed_engines))
        ]
        self.engines: list[FakeEngine] = [*self.prefill, *self.decode, *self.mixed]
        handoff = self._handoff_config()
        below = random.Random(f"tier in {self._seed}")
        has_tier = self.prefix_cache and below.random() < self.tier_rate
        lower = has_tier and self.lower_tiers
        self.tiers = drawn_tiers(self._seed, below, layout(1, sizes[0]), has_tier, lower=lower)
        self.transport = FakeTransport(
            self.engines,
            self.chance,
            tiers=self.tiers,
            loss_rate=0.1 if self._faults and handoff.deadline else 0.0,
            damage_rate=0.1 if self._faults and handoff.checksums else 0.0,
        )
        config = Config(
            kv=KVConfig(prefix_cache=self.prefix_cache),
            handoff=handoff,
            prefill=PrefillConfig(
                token_budget=(token_budget := draw.randint(1, 16)),
                max_sequences=draw.randint(1, 4),
                lookahead=draw.randint(0, 2),
                mixed_budget=apart.randint(1, token_budget) if self.mixed else None,
            ),
            decode=DecodeConfig(
                rows=rows,
                lookahead=draw.randint(0, 2),
                row_buckets=draw.choice((None, (1,), (1, 2), (2, 3))),
            ),
            max_waiting=draw.choice((3, 100)),
            max_logprobs=TOP_LOGPROBS,
            seed=draw.randrange(100),
            policies=drawn_policies(self._seed, self.happened),
            tiers=TiersConfig(bytes_in_flight=below.choice((1, 500, 10**6))),
            roles=drawn_roles(self._seed),
        )
        clock = VirtualClock()
        chance = random.Random(f"guides in {self._seed}")
        self.guides = SlowGuides(chance) if chance.random() < 0.7 else None
        self.coordinator = Coordinator(
            config,
            vocab_size=POISON + 1,
            max_model_len=self.max_model_len,
            end_token_ids=[END_TOKEN],
            engines=self.engines,
            transport=self.transport,
            events=PolledEvents(clock),
            clock=clock,
            recorder=Recorder(clock),
            roles=starting_roles(self.mixed, self._seed, self.happened),
            make_text=self._make_text,
            make_guide=make_guide,
            guides=self.guides,
            recompute=RecomputeCost(token=8.0, position=1.0),
            pools=[Pool(each.id, each.layout, each.num_pages) for each in self.tiers],
        )

    def _handoff_config(self) -> HandoffConfig:
        draw = self.random
        self.prefix_cache = self._draw_prefix_cache()
        return HandoffConfig(
            streaming=draw.random() < 0.7,
            after_tokens=draw.choice((0, 0, 0, 1, 3)),
            stay_below=draw.choice((0, 0, 0, 4, 1000)),
            give_back=self.prefix_cache and draw.random() < 0.5,
            rebalance=draw.random() < 0.5,
            checksums=draw.random() < 0.5,
            lease=draw.choice((None, 3.0)),
            deadline=draw.choice((None, 20.0)),  # no delay of a fake comes near
            retries=draw.randint(0, 2),
            reprefills=draw.randint(0, 2),
            max_bytes_in_flight=draw.choice((None, 1, 200)),
        )

    def _draw_prefix_cache(self) -> bool:
        return self.random.random() < 0.5

    def _visit(self, name: str) -> Visit:
        draw = self.random
        prompt = drawn_prompt(name, self._seed, draw, self.max_model_len)
        params = drawn_params(name, self._seed, draw, self.max_model_len)
        request = Request(name, prompt, params, 0.0, **drawn_options(name, self._seed))
        visit = Visit(request, at_step=draw.randint(0, 40))
        if draw.random() < 0.3:
            break_after = draw.randint(1, 5) if self._faults else None
            visit.text = FakeText(draw.choice((None, draw.randint(1, 8))), break_after)
        if draw.random() < 0.2:
            visit.abort_in = draw.choice([state for state in State if state in REACHED])
        elif draw.random() < 0.1:
            visit.abort_at_step = visit.at_step + draw.randint(0, 30)
        return visit

    def _make_text(self, request: Request) -> FakeText | None:
        [visit] = [visit for visit in self.visits if visit.request is request]
        return FakeText(visit.text.stop_after, visit.text.break_after) if visit.text else None

    def run(self, *, check: bool = True) -> None:
        """Live through it.

        Args:
          check: count pages at every step, and jobs at the end, too, and not only look at the
            tokens.
        """
        todo = list(self.visits)
        for step in range(MOST_STEPS):
            todo = [visit for visit in todo if not self._submit(visit, step)]
            for visit in self.visits:
                self._lose_patience(visit, step)
            self._hear(self._step())
            if check:
                self.coordinator.check()
            if not todo and not self.coordinator.has_work:
                break
        else:
            states = Counter(seq.state.name for visit in self.visits for seq in visit.sequences)
            raise AssertionError(f"no end in sight: {states}")
        for visit in self.visits:
            for sequence in visit.sequences:
                self._verify(sequence)
        self._verify_shapes()
        if self.guides is not None:
            self.happened["masks late"] += self.guides.late
        for name, totals in self.coordinator.loop.tiers.totals.items():
            self.happened.update(totals.to_json())
            self.happened[f"{name} hit_tokens"] += totals.hit_tokens
        if check:
            self._let_jobs_end()
            self.coordinator.check()

    def _let_jobs_end(self) -> None:
        """A job that is not wanted is cancelled when it arrives, or is given up some time later."""
        for _ in range(MOST_STEPS_TO_GIVE_UP):
            if not self.transport.under_way:
                return
            self._hear(self._step())
        raise AssertionError(f"under way for ever: jobs {sorted(self.transport.under_way)}")

    def _hear(self, news: list[Progress]) -> None:
        for progress in news:
            self._streamed.setdefault(progress.sequence, []).extend(progress.token_ids)
            self._finished[progress.sequence] += progress.finished

    def _step(self) -> list[Progress]:
        try:
            return self.coordinator.step()
        except InjectedInterrupt:  # another thread may go on
            self.happened["interrupted"] += 1
            return []

    def _submit(self, visit: Visit, step: int) -> bool:
        """Whether the request is in, or has been refused for good."""
        if step < visit.at_step:
            return False
        try:
            visit.sequences = self.coordinator.submit(visit.request)
        except QueueFull:
            self.happened["queue full"] += 1
            return False
        except ValueError:
            self.happened["refused"] += 1
        return True

    def _lose_patience(self, visit: Visit, step: int) -> None:
        states = {sequence.state for sequence in visit.sequences}
        if states and (visit.abort_in in states or visit.abort_at_step == step):
            for state in states:
                self.happened[f"abort in {state.name}"] += 1
            assert self.coordinator.abort(visit.request.id) == any(s in LIVE for s in states)
            assert not self.coordinator.abort(visit.request.id), "aborted twice"
            visit.abort_in = None

    def _verify_shapes(self) -> None:
        """Nothing was compiled that a warm-up would not have compiled."""
        states = self.coordinator.loop.fleet.engines
        for prefill in self.prefill:
            assert prefill.shapes <= set(states[prefill.id].buckets.prefill_shapes())
        for decode in self.decode:
            assert decode.shapes <= set(states[decode.id].rows.shapes())
        for mixed in self.mixed:
            buckets, rows = states[mixed.id].buckets, states[mixed.id].rows
            shapes = product(buckets.mixed_chunks(), rows.mixed_shapes())
            assert mixed.mixed <= {(*chunks, *tick) for chunks, tick in shapes}
            self.happened["mixed steps"] += len(mixed.mixed)

    def _verify(self, sequence: Sequence) -> None:
        """It got what it would have got alone."""
        name, params = sequence.id, sequence.request.params
        if POISON in sequence.request.prompt_token_ids:
            self._verify_poisoned(sequence)
            return
        expected = expected_output(sequence, self.layers)
        last = expected[-1]
        reason: tuple[str, int | str | None] = ("length", None)
        if (last == END_TOKEN and not params.ignore_eos) or last in params.stop_token_ids:
            reason = ("stop", last)
        elif completes(sequence.request, expected):
            reason = ("stop", None)
        text = sequence.text
        assert text is None or isinstance(text, FakeText)
        if text is not None and text.stop_after is not None:
            readable = len(expected) - isinstance(reason[1], int)
            if text.stop_after <= readable:
                expected, reason = expected[: text.stop_after], ("stop", STOP)
        output = sequence.output
        assert output == expected[: len(output)], f"{name}: {output}, not {expected}"
        assert self._streamed[sequence] == output, f"{name}: streamed {self._streamed[sequence]}"
        assert self._finished[sequence] == 1, f"{name}: finished {self._finished[sequence]} times"
        if params.logprobs is not None:
            assert [entry.chosen for entry in sequence.logprobs] == list(logprob_of(output))
            assert all(len(entry.top) == params.logprobs for entry in sequence.logprobs)
        self.happened["prompt scored"] += prompt_is_scored(sequence, self.layers)
        self.happened[sequence.state.name] += 1
        self.happened["preempted"] += sequence.epoch
        if (home := sequence.home) is not None:
            role = self.coordinator.loop.fleet.engines[home].role
            self.happened["prefilled where others decode"] += role is Role.DECODE
        self.happened["masked"] += params.constrained and len(output) > 1
        self.happened["masked and preempted"] += params.constrained and sequence.epoch > 0
        assert text is None or text.finished, f"{name}: its text is left open"
        match sequence.state:
            case State.FINISHED:
                assert output == expected, f"{name}: ended early, {output}, not {expected}"
                assert (sequence.finish_reason, sequence.stop_reason) == reason, name
            case State.FAILED:
                assert self._faults, f"{name}: {sequence.error}"
                assert sequence.error is not None
                assert sequence.error.startswith(FAULTS), sequence.error
            case State.ABORTED:
                assert sequence.finish_reason == "abort"
            case State.SHED:
                assert sequence.finish_reason == "shed" and not output and sequence.error, name
            case state:
                raise AssertionError(f"{name}: left in {state}")

    def _verify_poisoned(self, sequence: Sequence) -> None:
        """It has said nothing and says why, and nobody finds a page that it has spoiled."""
        assert sequence.output == [] and self._finished[sequence] == 1, sequence.id
        self.happened["poisoned"] += 1
        if sequence.state is State.FAILED:
            assert sequence.error is not None
            assert sequence.error.startswith(("FloatingPointError", *FAULTS)), sequence.error
        else:
            assert sequence.state in (State.ABORTED, State.SHED), sequence.state
        prompt = sequence.request.prompt_token_ids
        for pool in self.coordinator.loop.fleet.pools.values():
            index = pool.prefixes
            if index is not None:
                found = len(index.match(index.keys(prompt))) * index.page_size
                assert found <= prompt.index(POISON), f"{sequence.id}: {pool.id} keeps its poison"
