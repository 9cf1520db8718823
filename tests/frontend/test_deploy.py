"""What `deploy` makes of a config: on simulated engines here; tests/e2e has devices."""

import asyncio
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.common.tiny import tiny_spec
from pdjax.async_llm import AsyncLLM
from pdjax.config import RANDOM, Config, DecodeConfig, HandoffConfig, ModelConfig, PrefillConfig
from pdjax.core.clock import VirtualClock, WallClock
from pdjax.core.request import SamplingParams
from pdjax.core.roles import Role
from pdjax.core.slo import SLO
from pdjax.deploy import deploy
from pdjax.host.policies.prefill import FcfsPrefill
from pdjax.llm import LLM
from pdjax.sim.costs import StepCosts
from pdjax.workloads.arrival import Arrival

pytestmark = pytest.mark.smoke

CONFIG = Config(
    model=ModelConfig(
        source=RANDOM,
        spec=tiny_spec(256),
    ),
    prefill=PrefillConfig(engines=2, token_budget=64),
    decode=DecodeConfig(engines=2, stages=2, rows=4),
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def test_a_simulation_serves_as_devices_would_and_twice_the_same():
    def run() -> tuple[list[list[int]], float, dict[str, Any]]:
        with LLM(CONFIG, backend="sim") as llm:
            outputs = llm.generate([[1 + i, 2, 3] for i in range(12)], GREEDY)
            llm.coordinator.check()
            return [o.token_ids for o in outputs], llm.clock.now(), llm.report(SLO(ttft=1.0))

    tokens, seconds, report = run()
    assert [len(each) for each in tokens] == [8] * 12
    assert isinstance(deploy(CONFIG, "sim").clock, VirtualClock) and seconds > 7 * 7e-3
    assert report["slo_attainment"] == 1 and report["transfers"]["transfers"] == 12
    assert set(report["engines"]) >= {"prefill/0", "prefill/1", "decode/0", "decode/1"}
    assert run() == (tokens, seconds, report)


def test_a_colocated_simulation_moves_nothing():
    with LLM(CONFIG, {"colocated": True, **dict.fromkeys(ENGINES, 1)}, backend="sim") as llm:
        assert len({engine.pool for engine in llm.engines}) == 1
        [output] = llm.generate([1, 2, 3], GREEDY)
        assert len(output.token_ids) == 8
        assert llm.recorder.transfers.bytes == 0


def test_roles_change_from_the_front():
    prefill, decode = replace(CONFIG.prefill, mixed_budget=64), replace(CONFIG.decode, stages=1)
    config = replace(CONFIG, flexible="all", prefill=prefill, decode=decode)
    with LLM(config, backend="sim") as llm:
        roles = {str(state.id): state for state in llm.coordinator.loop.fleet}
        llm.set_role("prefill/1", "decode")
        assert roles["prefill/1"].role is Role.DECODE
        llm.set_role("decode/0", None)
        assert len(llm.generate([[1, 2, 3]] * 4, GREEDY)) == 4
        assert roles["decode/0"].service.outage is not None
        llm.set_role("decode/0", Role.DECODE)
        assert roles["decode/0"].service.outage is None
        with pytest.raises(ValueError, match="role='both': must be prefill, decode, mixed or None"):
            llm.set_role("prefill/0", "both")
        with pytest.raises(ValueError, match="engine=prefill/7: must be one of prefill/0"):
            llm.set_role("prefill/7", "decode")
        with pytest.raises(ValueError, match="let another one do so first"):
            llm.set_role("prefill/0", "decode")


ENGINES = ("prefill.engines", "decode.engines", "decode.stages")


def test_an_asyncio_program_runs_on_a_simulation():
    async def program() -> list[int]:
        async with AsyncLLM(CONFIG, backend="sim") as llm:
            return [t async for chunk in llm.stream([5, 6], GREEDY) for t in chunk.token_ids]

    with LLM(CONFIG, backend="sim") as llm:
        [output] = llm.generate([5, 6], GREEDY)
    assert asyncio.run(program()) == output.token_ids


def test_policies_are_arguments():
    planned = [0]

    class Counting(FcfsPrefill):
        def plan(self, *args: Any) -> Any:
            planned[0] += 1
            return super().plan(*args)

    with LLM(CONFIG, backend="sim", policies={"prefill": Counting}) as llm:
        llm.generate([1, 2, 3], GREEDY)
    assert planned[0] > 0


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (CONFIG, {"backend": "ray"}, "backend='ray': allowed are device, sim"),
        (CONFIG, {"backend": "x" * 1000}, "backend='xxx.*: allowed are device, sim"),
        (CONFIG, {"policies": {"prefil": "fcfs"}}, "policies='prefil': allowed are prefill, dec"),
        (CONFIG, {"policies": {"prefill": "lifo"}}, "policies.prefill='lifo': allowed are fcfs"),
        (CONFIG, {"clock": WallClock()}, "clock: a simulation has a clock of its own"),
        (
            replace(CONFIG, decode=replace(CONFIG.decode, kv_dtype="int8")),
            {},
            "decode.kv_dtype='int8': a simulation rounds no KV; must be None",
        ),
        (
            replace(CONFIG, handoff=HandoffConfig(wire_dtype="int8")),
            {},
            "handoff.wire_dtype='int8': a simulation rounds no KV",
        ),
        (
            replace(CONFIG, model=replace(CONFIG.model, max_model_len=300)),
            {},
            "model.max_model_len=300: the model's context is 256",
        ),
    ],
)
def test_what_cannot_be_deployed_is_refused(config: Config, given: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{message}"):
        deploy(config, **{"backend": "sim", **given})


def test_costs_are_of_a_simulation():
    costs = StepCosts(prefill_token=1.0)
    cluster = deploy(CONFIG, "sim", costs=costs).backing
    cluster.expect([Arrival(0.0, 3, 1)])
    assert cluster.run().requests[0].ttft == pytest.approx(3.0)
    with pytest.raises(ValueError, match=r"""^costs: of backend="sim" alone; backend='device'"""):
        deploy(CONFIG, "device", costs=costs)


def test_closing_is_final_and_may_come_twice():
    made = deploy(CONFIG, "sim")
    entry = made.session.submit(made.requests.of_prompt([1, 2], GREEDY, {}).request)
    made.close()
    made.close()
    assert entry.answer is not None and entry.answer.finish_reason == "abort"


def test_importing_pdjax_starts_no_device():
    script = (
        "import sys, pdjax, pdjax.cli; pdjax.SLO, pdjax.SamplingParams; print('jax' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "False\n"
