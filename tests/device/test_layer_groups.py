"""A prefill step cut into layer groups gives the same bits as the whole, and lets what each group
has written leave before the next is computed."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from pdjax.config import Config, DecodeConfig, HandoffConfig, KVConfig, ModelConfig, PrefillConfig
from pdjax.core.ids import EngineId, PoolId
from pdjax.core.kv_layout import split_groups
from pdjax.core.model_spec import ModelSpec
from pdjax.device.builder import build_engines
from pdjax.device.checkpoints.api import num_params
from pdjax.device.engine import JaxEngine
from pdjax.device.kv.pool import PoolOwner
from pdjax.device.kv.transport import DeviceTransport
from pdjax.device.kv.transports import Transports
from pdjax.device.layer_group_plan import Link, plan_groups, small_divisor
from pdjax.device.layer_groups import GROUP_OVERHEAD_S, measure_groups, step_flops
from pdjax.device.mesh import DECODE_RULES, PREFILL_RULES, make_mesh, take_devices
from pdjax.device.models.registry import kv_layout
from pdjax.device.models.weights import random_params
from pdjax.device.programs.prefill import PrefillProgram
from pdjax.device.steps.prefill import GroupedPrefillStep, make_prefill_step, pack
from pdjax.device.worker import DispatchWorker
from pdjax.interfaces.batches import PrefillBatch, SamplingBatch
from pdjax.interfaces.steps import PrefillStep
from pdjax.interfaces.transport import TransferJob

SPEC = ModelSpec(
    vocab_size=101,
    num_layers=7,
    model_dim=48,
    mlp_dim=96,
    query_heads=24,
    kv_heads=12,
    head_dim=4,
    context=64,
    eos_token_ids=(7,),
)
PAGES, PAGE_SIZE = 16, 4
ROUNDS = ((0, 7, 5), (7, 9, 8), (16, 4, 3))
"""Chunks of two sequences: where they start, and how many tokens each has."""


def batch(start: int, first: int, second: int) -> PrefillBatch:
    """A chunk of each of two sequences, padded to 24 tokens."""
    lens, total = [first, second], 24
    rng = np.random.default_rng(start)
    tokens = np.zeros(total, np.int32)
    positions, slots = np.zeros(total, np.int32), np.zeros(total, np.int32)
    starts, at = (start, start // 2), 0
    pages = [np.arange(1, 8), np.arange(8, 15)]
    for row, length in enumerate(lens):
        own = starts[row] + np.arange(length)
        tokens[at : at + length] = rng.integers(0, SPEC.vocab_size, length)
        positions[at : at + length] = own
        slots[at : at + length] = pages[row][own // PAGE_SIZE] * PAGE_SIZE + own % PAGE_SIZE
        at += length

    def of(dtype: str, value: float = 0) -> np.ndarray:
        return np.full(2, value, dtype)

    sampling = SamplingBatch(
        of("float32"),
        of("int32"),
        of("float32", 1),
        of("float32"),
        of("float32"),
        of("float32"),
        of("float32", 1),
        of("uint32"),
        of("int32"),
        of("bool"),
    )
    return PrefillBatch(
        tokens=tokens,
        positions=positions,
        slot_mapping=slots,
        kv_pages=np.concatenate(pages).astype(np.int32),
        cu_pages=np.array([0, 7, 14], np.int32),
        cu_q_lens=np.array([0, first, first + second], np.int32),
        kv_lens=np.array([starts[0] + first, starts[1] + second], np.int32),
        sample_at=np.array([first - 1, first + second - 1], np.int32),
        sampling=sampling,
        history=None,
    )


def pool_of(devices: list[jax.Device], stages: int, tp: int, dtype: str) -> PoolOwner:
    layout = kv_layout(SPEC, PAGE_SIZE, dtype, stages, tp)
    rules = PREFILL_RULES if stages == 1 else DECODE_RULES
    return PoolOwner(layout, PAGES, make_mesh(devices, stages, tp), rules)


def weights(pool: PoolOwner, dtype: str) -> Any:
    return random_params(SPEC, pool.mesh, PREFILL_RULES, pool.layout.stage_layers, dtype, seed=3)


def bits(array: Any) -> np.ndarray:
    got = np.asarray(array)
    return got.view(f"u{got.itemsize}")


@pytest.mark.parametrize(("tp", "groups", "dtype"), [(1, 7, "bfloat16"), (2, 3, "float32")])
def test_groups_give_the_bits_of_the_whole(tp, groups, dtype):
    [devices] = take_devices([tp], ["prefill"])
    whole, cut = pool_of(devices, 1, tp, dtype), pool_of(devices, 1, tp, dtype)
    params = weights(whole, dtype)
    step: Any = make_prefill_step(params, SPEC, tp)
    grouped = make_prefill_step(params, SPEC, tp, groups)
    assert isinstance(grouped, GroupedPrefillStep)
    for each in ROUNDS:
        packed = pack(batch(*each))
        whole.arrays, expected, x = step(params, whole.arrays, packed)
        got, its_x = grouped(params, cut, packed)
        np.testing.assert_array_equal(bits(its_x), bits(x))
        np.testing.assert_array_equal(bits(got.logits), bits(expected.logits))
        np.testing.assert_array_equal(got.positions, expected.positions)
        assert np.abs(np.asarray(got.logits)).max() > 0.1
    for ours, theirs in zip(cut.arrays, whole.arrays, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(bits(a)[:, 1:], bits(b)[:, 1:])
            assert bits(a)[:, 1].all()


PREFILL, DECODE = PoolId("hbm/prefill-0"), PoolId("hbm/decode-0")
PAGE_IDS = np.array([1, 2, 3, 8], np.int32)


def engine_of(
    source: PoolOwner,
    transport: DeviceTransport,
    groups: int,
    worker: DispatchWorker | None = None,
) -> JaxEngine:
    program = PrefillProgram(
        weights(source, "float32"), SPEC, source, max_logprobs=1, layer_groups=groups
    )
    transports = Transports([transport], {} if worker is None else {PREFILL: worker})
    return JaxEngine(EngineId("prefill/0"), PREFILL, source, [program], transports, worker)


class Watching(DeviceTransport):
    """Checks at each job that the layers up to it have been dispatched, and no others."""

    source: PoolOwner
    before: Any

    def send(self, job):
        for layer, (k, v) in enumerate(self.source.arrays):
            dispatched = layer < job.layers.stop
            assert (k is self.before[layer][0]) != dispatched
            assert (v is self.before[layer][1]) != dispatched
        return super().send(job)


@pytest.mark.parametrize("threaded", [False, True])
def test_a_group_leaves_before_the_next_is_dispatched(threaded):
    """The engine streams its KV by groups; what arrives is what it has in the end."""
    ours, theirs = take_devices([1, 2], ["prefill", "decode"])
    source, target = pool_of(ours, 1, 1, "float32"), pool_of(theirs, 2, 1, "float32")
    transport = Watching({PREFILL: source, DECODE: target})
    engine = engine_of(source, transport, 3, DispatchWorker() if threaded else None)
    assert engine.layer_groups == split_groups(7, 3)
    for number, each in enumerate(ROUNDS):
        transport.source, transport.before = source, source.arrays
        exports = tuple(
            (TransferJob(3 * number + group, PREFILL, DECODE, layers, PAGE_IDS, 4),)
            for group, layers in enumerate(engine.layer_groups)
        )
        ticket = engine.submit(PrefillStep(batch(*each), exports))
        assert list(ticket.exports) == [3 * number + group for group in range(3)]
        for job_id, sent in ticket.exports.items():
            assert sent.result().pages == 4
            transport.write(job_id, PAGE_IDS)
        assert ticket.result().tokens.shape == (2,)
    for layer in range(SPEC.num_layers):
        stage, slot = divmod(layer, target.layout.slots)
        heads = slice(stage * SPEC.kv_heads, (stage + 1) * SPEC.kv_heads)
        for there, here in zip(target.arrays[slot], source.arrays[layer], strict=True):
            np.testing.assert_array_equal(
                np.asarray(there)[heads, PAGE_IDS], np.asarray(here)[:, PAGE_IDS]
            )


def test_one_group_is_one_program_and_is_exported():
    ours, theirs = take_devices([1, 1], ["prefill", "decode"])
    source, target = pool_of(ours, 1, 1, "float32"), pool_of(theirs, 1, 1, "float32")
    engine = engine_of(source, DeviceTransport({PREFILL: source, DECODE: target}), groups=1)
    assert engine.layer_groups == (range(7),)
    job = TransferJob(1, PREFILL, DECODE, range(7), PAGE_IDS, 4)
    exported = engine.submit(PrefillStep(batch(*ROUNDS[0]), ((job,),))).exports
    assert exported[1].result().pages == 4
    [program] = engine.programs.values()
    step: Any = program._step.program  # type: ignore[attr-defined]
    compiled = len(step.forms)  # engines of other tests share the step
    engine.submit(PrefillStep(batch(*ROUNDS[0]))).result()
    assert len(step.forms) == compiled


def test_equal_groups_share_a_program_and_update_in_place():
    [devices] = take_devices([1], ["prefill"])
    pool = pool_of(devices, 1, 1, "float32")
    params = weights(pool, "float32")
    step = make_prefill_step(params, SPEC, 1, 3)
    assert isinstance(step, GroupedPrefillStep)
    where = [k.unsafe_buffer_pointer() for k in jax.tree.leaves(pool.arrays)]
    for each in ROUNDS[:2]:
        step(params, pool, pack(batch(*each)))
    three, two, last = step._layers  # 3 + 2 + 2 layers
    assert two is last
    assert [len(program.forms) for program in (three, two)] == [1, 1]
    assert [k.unsafe_buffer_pointer() for k in jax.tree.leaves(pool.arrays)] == where


@pytest.mark.parametrize(
    ("layers", "groups", "sizes"), [(7, 3, [3, 2, 2]), (8, 4, [2, 2, 2, 2]), (5, 1, [5])]
)
def test_groups_are_as_equal_as_can_be(layers, groups, sizes):
    cut = split_groups(layers, groups)
    assert [len(group) for group in cut] == sizes
    assert [layer for group in cut for layer in group] == list(range(layers))
    with pytest.raises(ValueError, match=f"layer_groups=9: must be between 1 and .* {layers}"):
        split_groups(layers, 9)


# How many.

LINK = Link(latency_s=2e-4, bytes_per_s=2e11)
CASES = [
    # layers, bytes, prefill_s, overhead_s; the fewest groups that end first
    ((32, 0, 1e-1, 1e-4), 1),  # nothing to hide
    ((32, 2**28, 0.0, 1e-4), 1),  # nothing to hide it behind
    ((32, 2**28, 0.1, 1e-4), 4),  # 100 ms hide most of 1.3 ms; each group costs 0.1 ms
    ((32, 2**32, 0.1, 1e-4), 16),
    ((31, 2**32, 0.1, 1e-4), 12),  # a prime number of layers: worth a second program
    ((2, 2**32, 0.1, 1e-4), 2),
]


@pytest.mark.parametrize(("case", "groups"), CASES)
def test_the_planner_ends_first(case, groups):
    layers, wire_bytes, prefill_s, overhead_s = case
    assert plan_groups(layers, wire_bytes, LINK, prefill_s, overhead_s) == groups


def test_the_planner_does_not_follow_the_noise_of_a_link():
    """Llama 3 8B, 2,048 tokens, as measured on one pair of H200 after another."""
    links = [Link(5e-5, rate * 1e9) for rate in range(250, 475, 25)]
    assert {plan_groups(32, 2**28, link, 0.044, GROUP_OVERHEAD_S) for link in links} == {4}


def test_a_link_is_a_line_through_two_puts():
    link = Link.through((1_000_000, 0.003), (11_000_000, 0.013))
    assert link.bytes_per_s == pytest.approx(1e9) and link.latency_s == pytest.approx(0.002)
    assert Link.through((10, 0.5), (1000, 0.4)) == Link(0.0, 2500.0)  # noise
    assert Link.through((10, 0.0), (1000, 0.4)) == Link(0.0, 2500.0)


def test_without_a_clock_worth_reading_there_are_few_groups():
    assert [small_divisor(layers) for layers in (32, 30, 7, 9, 2)] == [4, 3, 1, 3, 2]


def test_groups_are_measured_within_a_second():
    ours, theirs = take_devices([1, 2], ["prefill", "decode"])
    pools = {PREFILL: pool_of(ours, 1, 1, "float32"), DECODE: pool_of(theirs, 2, 1, "float32")}
    config = Config(
        model=ModelConfig(source="random", spec=SPEC), prefill=PrefillConfig(token_budget=64)
    )
    groups = measure_groups(config, SPEC, DeviceTransport(pools), pools, PREFILL, DECODE)
    assert 1 <= groups <= 7
    inside = num_params(SPEC) - 2 * SPEC.vocab_size * SPEC.model_dim
    assert step_flops(SPEC, 3) == pytest.approx(2 * 3 * inside, rel=0.02)  # norms left out


@pytest.mark.parametrize(
    ("handoff", "groups"),
    [({}, 1), ({"layer_groups": 3}, 3), ({"layer_groups": 3, "streaming": False}, 1)],
)
def test_engines_are_built_as_configured(handoff, groups):
    config = Config(
        model=ModelConfig(source="random", spec=SPEC),
        kv=KVConfig(page_size=4),
        decode=DecodeConfig(stages=2, page_size=8, kv_dtype="bfloat16"),
        handoff=HandoffConfig(wire_dtype="int8", **handoff),
    )
    engines = build_engines(config, SPEC, 64, None)
    prefill, decode = engines.engines
    assert len(prefill.layer_groups) == groups
    assert (prefill.id, prefill.pool, prefill.rows) == (EngineId("prefill/0"), PREFILL, 0)
    assert (decode.id, decode.pool, decode.rows) == (EngineId("decode/0"), DECODE, 8)
    layouts = [prefill.layout, decode.layout]
    assert [(each.page_size, each.dtype) for each in layouts] == [(4, "float32"), (8, "bfloat16")]
    assert engines.transport.connects(PREFILL, DECODE)
    [transport] = engines.transport.transports
    assert isinstance(transport, DeviceTransport)
    assert transport.path(DECODE, PREFILL).wire.dtype == "int8"
    again = engines.handing_over(HandoffConfig(wire_dtype=None), 7)
    assert [len(each.layer_groups) for each in again.engines] == [7, 1]
    assert again.engines[1].programs == decode.programs  # compiled once
    [transport] = again.transport.transports
    assert isinstance(transport, DeviceTransport)
    assert transport.path(DECODE, PREFILL).wire.dtype == "bfloat16"


def test_a_shared_pool_has_one_group():
    config = Config(
        model=ModelConfig(source="random", spec=SPEC),
        colocated=True,
    )
    engines = build_engines(config, SPEC, 64, None)
    prefill, decode = engines.engines
    assert prefill.layer_groups == (range(7),)
    assert prefill.pool == decode.pool == PoolId("hbm/0")
    assert not engines.transport.connects(prefill.pool, decode.pool)
    too_many = replace(config, colocated=False, handoff=HandoffConfig(layer_groups=8))
    with pytest.raises(ValueError, match="layer_groups=8: must be between 1 and"):
        build_engines(too_many, SPEC, 64, None)
