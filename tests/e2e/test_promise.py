"""The promise: disaggregated tokens equal monolithic tokens, exactly, for every pair of layouts."""

from dataclasses import replace

import pytest

from pdjax.llm import LLM
from pdjax.request import SamplingParams, State
from tests.e2e.promise import MONOLITHIC, answers, conserved, disaggregated, expected, workload

LAYOUTS = [
    (1, 1, 1),
    (2, 1, 1),
    (1, 2, 1),
    (1, 1, 2),
    (2, 3, 2),
    (3, 5, 1),
    (3, 2, 2),
    (4, 4, 1),
    (4, 6, 2),
    (1, 7, 1),
]


@pytest.mark.parametrize(("tp_p", "stages", "tp_d"), LAYOUTS)
def test_token_exact(tp_p, stages, tp_d):
    with LLM(disaggregated(tp_p, stages, tp_d)) as llm:
        assert answers(llm) == expected()
        assert llm.recorder.transfers.transfers > 0
        assert llm.recorder.transfers.layout_changing_puts == 0


@pytest.mark.smoke
def test_token_exact_smoke():
    with LLM(disaggregated(2, 2, 1)) as llm:
        assert answers(llm) == expected()


def test_several_engines_of_each_kind():
    config = disaggregated(2, 2, 1)
    config = replace(
        config,
        prefill=replace(config.prefill, engines=2),
        decode=replace(config.decode, engines=3, rows=2),
    )
    with LLM(config) as llm:
        assert answers(llm) == expected()
        tracks = set(llm.recorder.engines)
    assert {"prefill/0", "prefill/1", "decode/0", "decode/1", "decode/2"} <= tracks


@pytest.mark.parametrize("lookahead", [0, 3])
def test_lookahead_changes_nothing(lookahead):
    config = disaggregated(1, 3, 1, lookahead=lookahead)
    config = replace(config, prefill=replace(config.prefill, lookahead=lookahead))
    with LLM(config) as llm:
        assert answers(llm) == expected()


@pytest.mark.parametrize("stages", [1, 3])
def test_preemption_changes_nothing(stages):
    # 14 pages of 4 tokens hold one of the long sequences, and little beside it.
    with LLM(disaggregated(1, stages, 1, pages=15)) as llm:
        assert answers(llm) == expected()
        preemptions = sum(metrics.preemptions for metrics in llm.recorder.requests())
    assert preemptions > 0


def test_colocated_on_a_mesh_changes_nothing():
    config = replace(
        MONOLITHIC,
        prefill=replace(MONOLITHIC.prefill, tp=2),
        decode=replace(MONOLITHIC.decode, tp=2),
    )
    with LLM(config) as llm:
        assert answers(llm) == expected()
        assert llm.recorder.transfers.bytes == 0


@pytest.mark.parametrize(
    "state",
    [State.WAITING, State.PREFILLING, State.PREFILLED, State.TRANSFERRING, State.DECODING],
)
def test_abort_hurts_nobody_else(state, two_stages):
    llm, work = two_stages, workload()
    neighbours = [llm.submit(prompt, params) for prompt, params in work]
    victim = llm.submit([9] * 18, SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))
    [sequence] = llm._asked[victim].sequences
    while sequence.state is not state:
        llm.step()
    llm.abort(victim)
    conserved(llm)

    aborted = llm.take_output(victim)
    assert aborted is not None
    assert aborted.finish_reason == "abort"
    assert (aborted.token_ids == []) == (state in (State.WAITING, State.PREFILLING))
    outputs = [llm.take_output(neighbour) for neighbour in neighbours]
    assert [[c.token_ids for c in output.choices] for output in outputs] == expected()


@pytest.fixture(scope="module")
def two_stages():
    with LLM(disaggregated(1, 2, 1, rows=2)) as llm:
        yield llm
