"""What the device column promises beside the right tokens: nothing compiles after the warm-up, and
steps update their pools in place."""

import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from pdjax.config import HandoffConfig, PoliciesConfig
from pdjax.core.request import SamplingParams
from pdjax.device.kept.program import KeptProgram
from pdjax.device.mesh import HOST
from pdjax.device.needs import program_bytes
from pdjax.host.batching.largest import largest_steps
from pdjax.interfaces.steps import StepKind
from pdjax.llm import LLM
from tests.helpers.promise import COLD, MONOLITHIC, answers, disaggregated, expected

COMPILED = "/jax/core/compile/backend_compile_duration"
TRACED = "/jax/core/compile/jaxpr_trace_duration"


@pytest.fixture
def compilations():
    """Names of the compilations and traces since; a list that grows."""
    seen: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event in (COMPILED, TRACED):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


EVERYTHING = replace(
    disaggregated(2, 2, 1, page_size=8, row_buckets=(1,)),
    kv=replace(MONOLITHIC.kv, prefix_cache=True),
    handoff=HandoffConfig(layer_groups=3, checksums=True, give_back=True, after_tokens=1),
)


BY_A_THREAD = replace(EVERYTHING, prefill=replace(EVERYTHING.prefill, dispatch_thread=True))


FLEXIBLE = replace(
    disaggregated(1, 1, 1, groups=1),
    flexible="decode",
    prefill=replace(MONOLITHIC.prefill, mixed_budget=8),
    policies=PoliciesConfig(placement="conditional", local_tokens=20),
)


@pytest.fixture
def variants(request: pytest.FixtureRequest) -> None:
    """All programs that choose tokens for one device without a hand-off; few for other layouts."""
    if request.getfixturevalue("config") is not MONOLITHIC:
        request.getfixturevalue("few_variants")


@pytest.mark.usefixtures("variants")
@pytest.mark.parametrize(
    "config", [MONOLITHIC, disaggregated(2, 2, 1), EVERYTHING, BY_A_THREAD, FLEXIBLE]
)
def test_nothing_compiles_after_the_warm_up(config, compilations):
    wanted = expected()  # of another LLM, which compiles as it goes
    with LLM(config) as llm:
        compilations.clear()
        assert answers(llm) == wanted
        assert config is not FLEXIBLE or min(llm.report()["prefills"].values()) > 0
        llm.generate([[1, 2, 3] * 9], SamplingParams(max_tokens=1, prompt_logprobs=2))
        for length in range(5, 10):  # alone, so that rows run ahead
            llm.generate([[1] * length], SamplingParams(max_tokens=3))
        assert all(needed(llm)), "also what pools are sized by, by the largest steps"
        assert not compilations


def needed(llm: LLM) -> list[int | None]:
    """What the programs of each engine need beside weights and pool."""
    engines: Any = llm.engines
    asked = [(engine.layout, list(engine.programs.values())) for engine in engines]
    largest = partial(largest_steps, llm.config, context=llm.max_model_len)
    return [
        program_bytes(programs, largest(layout, [each.kind for each in programs]))
        for layout, programs in asked
    ]


@pytest.mark.usefixtures("variants")
@pytest.mark.parametrize("config", [MONOLITHIC, disaggregated(2, 2, 1), EVERYTHING])
def test_a_warm_up_runs_what_was_compiled_before(config, monkeypatch):
    config = replace(config, warm_up=False, max_logprobs=5)  # which no other test has
    sizes = {"prefill.pages": 43, "decode.pages": 44}
    forms: list[tuple[str, Any]] = []
    made, wanted = KeptProgram._made, expected()  # of another LLM, which compiles as it goes

    def noted(program: KeptProgram, *given: Any) -> Any:
        forms.append((threading.current_thread().name, program))
        return made(program, *given)

    monkeypatch.setattr(KeptProgram, "_made", noted)
    with LLM(config, sizes) as llm:
        before = [np.asarray(leaf) for leaf in jax.tree.leaves(arrays(llm))]

        def show(todo: list[Any], what: str) -> list[Any]:
            if what != "compiling":
                after = [np.asarray(leaf) for leaf in jax.tree.leaves(arrays(llm))]
                assert all(map(np.array_equal, before, after))
            return todo

        llm.coordinator.warm_up(show)
        assert answers(llm) == wanted
    assert forms and {name for name, _ in forms} == {"pdjax compile"}


def arrays(llm: LLM) -> Any:
    """All that lives on the devices from step to step."""
    pools: Any = llm.deployment.backing.pools
    _, decode = programs(llm)
    return [pool.arrays for pool in pools.values()], decode._x, decode._history


@pytest.mark.usefixtures("few_variants")
def test_a_second_llm_of_the_same_shapes_compiles_and_traces_nothing(compilations):
    config = replace(EVERYTHING, max_logprobs=7)  # which no other test has
    with LLM(config):
        assert any(event == COMPILED for event in compilations)
    compilations.clear()
    with LLM(replace(config, seed=config.seed)) as llm:
        assert not compilations
        assert answers(llm) == expected()
        assert not compilations


@pytest.mark.usefixtures("few_variants")
def test_a_rehearsal_of_the_same_shapes_runs_once_in_a_process():
    config = replace(disaggregated(1, 2, 1), max_logprobs=6)  # which no other test has
    for pages, runs in ((40, True), (40, False), (41, True)):
        with LLM(config, {"warm_up": False, "prefill.pages": pages, "decode.pages": pages}) as llm:
            seen: list[Any] = []
            for program in programs(llm):
                program._dispatch = partial(watched, program._dispatch, seen)
            llm.coordinator.warm_up()
            assert bool(seen) == runs
            assert llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2))[0].error is None


def test_other_shapes_share_no_programs():
    layouts = [disaggregated(1, 1, 1), disaggregated(1, 2, 1)]
    steps = []
    for config in layouts:
        with LLM(config, COLD) as llm:
            prefill, decode = programs(llm)
            steps.append((prefill._step.program, decode._tick))
    assert steps[0][0] is steps[1][0]
    assert steps[0][1] is not steps[1][1]


class Compiled:
    """Wraps a step: keeps what XLA says of its memory at each first call of a shape."""

    def __init__(self, step) -> None:
        self.step = step
        self.memory: list[Any] = []

    def __call__(self, *args):
        self.memory.append(self.step.jitted.lower(*args).compile().memory_analysis())
        return self.step(*args)


def test_pools_are_updated_in_place():
    config = disaggregated(1, 1, 1, groups=1, pages=4001)
    with LLM(config, {"prefill.pages": 4001, "warm_up": False}) as llm:
        prefill, decode = programs(llm)
        ticks = decode.size(config.decode.rows)
        steps = {
            "prefill": Compiled(prefill._step.program),
            "decode": Compiled(ticks.tick.program),
        }
        prefill._step, ticks.tick = steps["prefill"], steps["decode"]
        transport: Any = llm.deployment.backing.transport.transports[0]
        path = transport.path(*(engine.pool for engine in llm.engines))
        plan = path.plan(range(llm.spec.num_layers))
        steps["write"] = Compiled(plan.scatter)
        path.plan = lambda layers: replace(plan, scatter=steps["write"])
        llm.generate([[1, 2, 3]])
    pool_bytes = llm.engines[0].layout.page_bytes * 4001
    for name, step in steps.items():
        assert step.memory, name
        for memory in step.memory:
            assert memory.alias_size_in_bytes >= pool_bytes, name
            assert memory.temp_size_in_bytes < pool_bytes / 20, name


def test_a_mixed_step_updates_its_pool_in_place():
    overrides = {"prefill.pages": 4001, "decode.pages": 4001, "prefill.mixed_budget": 8}
    with LLM(MONOLITHIC, overrides | {"warm_up": False}) as llm:
        [engine] = llm.deployment.backing.engines
        mixed = engine.programs[StepKind.MIXED]
        step = mixed._step = Compiled(mixed._step.program)
        params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
        llm.generate([[1, 2, 3], [4] * 40], params)
    pool_bytes = engine.layout.page_bytes * 8001
    assert step.memory
    for memory in step.memory:
        assert memory.alias_size_in_bytes >= pool_bytes
        assert memory.temp_size_in_bytes < pool_bytes / 20


def test_what_a_tick_makes_stays_where_it_is():
    # On a GPU every address that changes makes the launch of the next tick dearer.
    with LLM(disaggregated(1, 2, 1), COLD) as llm:
        _, decode = programs(llm)
        seen: list[Any] = []
        dispatch = decode.dispatch

        def watched(*args):
            ticket = dispatch(*args)
            undecided = [size.undecided for size in decode._sizes.values()]
            kept = decode._pool.arrays, decode._x, undecided, decode.fed_back, decode._history
            seen.append([addresses(leaf) for leaf in jax.tree.leaves(kept)])
            return ticket

        decode.dispatch = watched
        llm.generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
    assert len(seen) > 8
    assert all(each == seen[1] for each in seen[2:])


@pytest.mark.parametrize("logprobs", [None, pytest.param(2, marks=pytest.mark.smoke)])
def test_tokens_land_in_the_memory_of_the_host(logprobs):
    # Where a copy that the host asks for would be late.
    with LLM(disaggregated(2, 2, 1), COLD) as llm:
        seen: list[Any] = []
        for program in programs(llm):
            program.dispatch = partial(watched, program.dispatch, seen)
        params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=logprobs)
        [out] = llm.generate([[1, 2, 3]], params)
    assert len(out.token_ids) == 4 and len(seen) > 4
    assert {leaf.sharding.memory_kind for ticket in seen for leaf in ticket._leaves} == {HOST}


def programs(llm: LLM) -> tuple[Any, Any]:
    """Those of prefill and of decode."""
    prefill, decode = llm.deployment.backing.engines
    return prefill.programs[StepKind.PREFILL], decode.programs[StepKind.DECODE]


def watched(dispatch, seen, *args):
    seen.append(dispatch(*args))
    return seen[-1]


def addresses(array):
    return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]


LEAVES = """
import jax
jax.config.update("jax_num_cpu_devices", 2)
from pdjax.llm import LLM
from tests.helpers.promise import disaggregated, workload
llm = LLM(disaggregated(1, 1, 1, 3), {"prefill.dispatch_thread": True, "warm_up": False})
for prompt, params in workload():
    llm.submit(prompt, params)
llm.step()
"""


def test_a_process_may_end_while_its_thread_dispatches():
    subprocess.run([sys.executable, "-c", LEAVES], check=True, timeout=300)
