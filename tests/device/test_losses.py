"""A device that fails after it was given the pool: the engine counts a loss, goes on with an empty
pool, and says so before anything that was computed from that can be seen."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pdjax.core.ids import EngineId, PoolId
from pdjax.core.model_spec import ModelSpec
from pdjax.device.engine import JaxEngine
from pdjax.device.kv.pool import PoolOwner
from pdjax.device.kv.transports import Transports
from pdjax.device.mesh import PREFILL_RULES, make_mesh, take_devices
from pdjax.device.models.registry import kv_layout
from pdjax.device.models.weights import random_params
from pdjax.device.programs import decode
from pdjax.device.programs.decode import DecodeProgram
from pdjax.device.programs.prefill import PrefillProgram
from pdjax.device.worker import DispatchWorker
from pdjax.interfaces.batches import USE_FED_BACK, DecodeBatch, PrefillBatch, SamplingBatch
from pdjax.interfaces.steps import DecodeStep, PrefillStep, Step

SPEC = ModelSpec(
    vocab_size=31,
    num_layers=2,
    model_dim=16,
    mlp_dim=32,
    query_heads=2,
    kv_heads=2,
    head_dim=8,
    context=32,
)
ROWS, PAGE_SIZE, PAGES = 2, 4, 6
POOL = PoolId("hbm/0")


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def greedy(rows: int) -> SamplingBatch:
    def of(dtype: str, value: float = 0) -> np.ndarray:
        return np.full(rows, value, dtype)

    return SamplingBatch(
        temperature=of("float32"),
        top_k=of("int32"),
        top_p=of("float32", 1),
        min_p=of("float32"),
        presence_penalty=of("float32"),
        frequency_penalty=of("float32"),
        repetition_penalty=of("float32", 1),
        seed=of("uint32"),
        prompt_lens=of("int32"),
        logprobs=of("bool"),
    )


PREFILL = PrefillStep(
    PrefillBatch(
        tokens=numbers(3, 1, 4, 1),
        positions=numbers(0, 1, 2, 3),
        slot_mapping=numbers(4, 5, 6, 7),
        kv_pages=numbers(1, 0),
        cu_pages=numbers(0, 1),
        cu_q_lens=numbers(0, 4),
        kv_lens=numbers(4),
        sample_at=numbers(3),
        sampling=greedy(1),
        history=None,
    )
)


def tick(number: int) -> DecodeStep:
    """Of the sequence that PREFILL has prefilled, and of an idle row."""
    table = np.array([[[1, 2], [0, 0]]], np.int32)
    positions = np.array([[4, -1]], np.int32)
    rows = np.array([[0, 1]], np.int32)
    return DecodeStep(DecodeBatch(number, numbers(5, 0), rows, positions, table, greedy(ROWS)))


class Pair:
    """A prefill and a decode engine that share weights, a pool, and a worker if there is one."""

    def __init__(self, *, threaded: bool) -> None:
        [devices] = take_devices([1], ["both"])
        layout = kv_layout(SPEC, PAGE_SIZE, "float32")
        self.pool = PoolOwner(layout, PAGES, make_mesh(devices, 1, 1), PREFILL_RULES)
        params = random_params(
            SPEC, self.pool.mesh, PREFILL_RULES, layout.stage_layers, "float32", seed=1
        )
        self.prefill = PrefillProgram(params, SPEC, self.pool, max_logprobs=1)
        self.decode = DecodeProgram(
            params, SPEC, self.pool, rows=ROWS, context=32, max_logprobs=1, attention=None
        )
        worker = DispatchWorker() if threaded else None
        transports = Transports([], {} if worker is None else {POOL: worker})
        self.engines = [
            JaxEngine(EngineId(each.kind.value), POOL, self.pool, [each], transports, worker)
            for each in (self.prefill, self.decode)
        ]

    def submit(self, step: Step) -> Any:
        [engine] = [each for each in self.engines if step.kind in each.accepts]
        return engine.submit(step)

    def tokens(self) -> tuple[int, int]:
        """Of a prefill and the tick after it."""
        chosen = self.submit(PREFILL).result(), self.submit(tick(0)).result()
        return int(chosen[0].tokens[0]), int(chosen[1].tokens[0])

    @property
    def losses(self) -> list[int]:
        return [engine.losses for engine in self.engines]


def fail_once(owner: Any, name: str) -> None:
    """Let the next call fail when what it was given is gone."""
    call = getattr(owner, name)

    def fail(*args: Any) -> Any:
        setattr(owner, name, call)
        call(*args)
        raise RuntimeError("the device has failed")

    setattr(owner, name, fail)


@pytest.mark.parametrize("threaded", [False, True])
def test_an_engine_goes_on_after_a_failure(threaded):
    pair = Pair(threaded=threaded)
    right = pair.tokens()
    assert pair.losses == [0, 0]
    for owner, name, step, losses in (
        (pair.prefill, "_step", PREFILL, [1, 1]),
        (pair.decode.size(ROWS), "tick", tick(1), [2, 3]),  # the pool and what ticks carry on
        (pair.decode, "_sample", tick(2), [2, 4]),  # that alone
        (decode, "_write_history", None, [2, 5]),
    ):
        fail_once(owner, name)
        if step is not None:
            failed = pair.submit(step)
        elif threaded:
            pair.engines[1].set_history(0, np.zeros(32, np.int32))
            failed = pair.submit(tick(3))
        else:
            with pytest.raises(RuntimeError, match="the device has failed"):
                pair.engines[1].set_history(0, np.zeros(32, np.int32))
            failed = None
        after = pair.submit(tick(4))  # asked before the error was seen
        if failed is not None:
            with pytest.raises(RuntimeError, match="the device has failed"):
                failed.result()
        assert pair.losses == losses, name
        after.result()
        assert pair.tokens() == right
    for engine in pair.engines:
        engine.close()
        engine.close()
    assert pair.pool.arrays == []


def unknown(number: int) -> DecodeStep:
    """`tick`, with the token that the row was fed."""
    known = tick(number).batch
    return DecodeStep(replace(known, tokens=numbers(USE_FED_BACK, 0)))


@pytest.mark.parametrize("threaded", [False, True])
def test_a_row_goes_on_with_the_token_that_it_was_fed(threaded):
    pair = Pair(threaded=threaded)
    _, engine = pair.engines
    step = pair.submit(PREFILL)
    known = tick(0).batch
    token = int(step.result().tokens[0])
    right = pair.submit(DecodeStep(replace(known, tokens=numbers(token, 0)))).result().tokens[0]
    step = pair.submit(PREFILL)
    engine.feed(0, step, 0)
    assert pair.submit(unknown(1)).result().tokens[0] == right
    step = pair.submit(PREFILL)
    fail_once(decode, "_feed")
    with nullcontext() if threaded else pytest.raises(RuntimeError, match="the device has failed"):
        engine.feed(0, step, 0)
    if threaded:
        with pytest.raises(RuntimeError, match="the device has failed"):
            pair.submit(unknown(2)).result()
    assert pair.losses == [0, 1]  # what ticks carry on
    engine.feed(0, step, 0)
    assert pair.submit(unknown(3)).result().tokens[0] == right
