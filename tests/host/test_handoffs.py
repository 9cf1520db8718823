"""Hand-offs in situations made by hand; `tests/property` makes all the others."""

from dataclasses import replace
from typing import Any

import pytest

from pdjax.config import Config, HandoffConfig, KVConfig
from pdjax.core.ids import EngineId
from pdjax.core.request import Request, SamplingParams
from pdjax.host.handoff.handoff import Handoff
from pdjax.host.policies.api import EngineView, PolicySetup
from pdjax.host.policies.handoff import HandoffRules
from pdjax.host.sequences.sequence import State
from pdjax.interfaces.steps import PrefillStep
from pdjax.interfaces.transport import TransferJob
from tests.helpers.deployment import CONFIG, Deployment, deploy, expected
from tests.helpers.fake_guides import VOCAB
from tests.helpers.views import decode_view
from tests.host.test_policies import NOW

PAGE_BYTES = 4 * 4 * 2 * 4
"""Layers, tokens, K and V, bytes of an element."""


def deployed(
    *, prefix_cache: bool = False, stages: tuple[int, ...] = (1,), groups: int = 1, **handoff: Any
) -> Deployment:
    config = replace(
        CONFIG, handoff=HandoffConfig(**handoff), kv=KVConfig(prefix_cache=prefix_cache)
    )
    return deploy(config, stages=stages, groups=groups)


def route(job: TransferJob) -> tuple[str, str]:
    """The pools of a transfer job."""
    return job.source, job.target


def sent(deployment: Deployment) -> list[tuple[int, int, int]]:
    """First layer, last layer and pages of each transfer job."""
    return [(s.layers.start, s.layers.stop, s.pages) for s in deployment.transport.jobs]


def test_kv_leaves_by_chunk_and_layer_group_while_it_is_computed():
    deployment = deployed(groups=2)
    sequence = deployment.submit("a", prompt_len=19)  # chunks of 8, 8 and 3 tokens; pages of 4
    deployment.run_until(lambda: bool(sequence.output))
    assert sent(deployment) == [(0, 2, 2), (2, 4, 2)] * 2 + [(0, 2, 1), (2, 4, 1)]
    deployment.run()
    assert sequence.output == expected(sequence)
    metrics = deployment.recorder.request(sequence)
    assert (metrics.transfer.shipments, metrics.transfer.transfers) == (6, 1)
    assert metrics.transfer.pages == 10


def test_in_bulk_it_leaves_when_the_prefill_has_ended():
    deployment = deployed(groups=2, streaming=False)
    sequence = deployment.submit("a", prompt_len=19)
    deployment.run_until(lambda: bool(sequence.output))
    deployment.run()
    assert sent(deployment) == [(0, 4, 5)]
    assert sequence.output == expected(sequence)


def test_what_can_leave_does_not_wait_for_the_next_step(monkeypatch):
    deployment = deployed(streaming=False)
    engine, left = deployment.prefill[0], []
    submit = engine.submit

    def step(step):
        left.append(len(deployment.transport.jobs))
        return submit(step)

    monkeypatch.setattr(engine, "submit", step)
    for name in "ab":
        deployment.submit(name, prompt_len=8)  # a step each
    deployment.run()
    assert left == [0, 1]


def test_room_that_is_not_free_ahead_is_found_afterwards():
    deployment = deployed()
    long = [deployment.submit(name, max_tokens=20) for name in "ab"]  # both rows
    deployment.run_until(lambda: all(sequence.state is State.DECODING for sequence in long))
    third = deployment.submit("c", prompt_len=17)
    deployment.run_until(lambda: third.state is State.PREFILLED)
    assert third.handoff is None
    deployment.run()
    assert third.output == expected(third)


def test_a_lease_ends_and_room_is_free_again():
    deployment = deployed(lease=2.0)
    sequence = deployment.submit("a", prompt_len=20)
    deployment.coordinator.step()
    assert sequence.handoff is not None
    deployment.clock.advance(3.0)
    deployment.coordinator.step()
    assert sequence.handoff is None
    deployment.run()
    assert sequence.output == expected(sequence)


def test_no_more_is_on_the_way_than_allowed():
    deployment = deployed(max_bytes_in_flight=2 * PAGE_BYTES)  # the smallest job has four
    deployment.transport._chance.max_delay = 3
    queue, most = deployment.coordinator.loop.handoffs.queue, 0
    sequences = [deployment.submit(name, prompt_len=6) for name in "abcd"]
    while deployment.coordinator.has_work:
        deployment.coordinator.step()
        most = max(most, queue.bytes_in_flight)
    assert most == 4 * PAGE_BYTES
    assert [sequence.output for sequence in sequences] == [expected(each) for each in sequences]


def test_jobs_keep_within_the_bound_and_none_overtakes():
    config = replace(
        CONFIG,
        prefill=replace(CONFIG.prefill, token_budget=40, max_sequences=8),
        decode=replace(CONFIG.decode, rows=8),
        handoff=HandoffConfig(streaming=False, max_bytes_in_flight=9 * PAGE_BYTES),
        max_waiting=20,
    )
    deployment = deploy(config, max_delay=3)
    queue, most = deployment.coordinator.loop.handoffs.queue, 0
    large = deployment.submit("large", prompt_len=24)
    small = [deployment.submit(f"small {n}", prompt_len=3) for n in range(12)]
    while deployment.coordinator.has_work:
        deployment.coordinator.step()
        most = max(most, queue.bytes_in_flight)
    assert most == 8 * PAGE_BYTES  # two jobs of four
    landed = [
        (moment, metrics.id)
        for metrics in deployment.recorder.requests()
        for name, moment in metrics.marks
        if name == "transfer_landed"
    ]
    assert "large#0" in [name for _, name in sorted(landed)[:5]]
    assert [each.output for each in (large, *small)] == [expected(each) for each in (large, *small)]


def test_a_job_that_is_not_wanted_takes_its_room_until_it_has_come():
    deployment = deployed(streaming=False)
    sequence = deployment.submit("a")
    deployment.transport._chance.max_delay = 50
    deployment.run_until(lambda: sequence.state is State.TRANSFERRING)
    queue = deployment.coordinator.loop.handoffs.queue
    before = queue.bytes_in_flight
    deployment.coordinator.abort("a")
    assert queue.bytes_in_flight == before > 0
    assert not deployment.coordinator.loop.handoffs.busy


def test_a_step_carries_its_exports_and_no_token_is_told_before_the_turn_has_ended(monkeypatch):
    """What is dispatched after a layer group is in the step: the coordinator is not called back."""
    deployment = deployed(groups=4)
    early = deployment.submit("early", max_tokens=20)
    deployment.run_until(lambda: len(early.output) > 2)
    engine, steps = deployment.prefill[0], list[PrefillStep]()
    submit = engine.submit

    def keep(step):
        steps.append(step)
        return submit(step)

    monkeypatch.setattr(engine, "submit", keep)
    late = deployment.submit("late", prompt_len=8)
    told = [each.stop for each in deployment.coordinator.step() if each.sequence is early]
    assert told == [len(early.output)]
    [step] = steps
    layers = [[job.layers for job in jobs] for jobs in step.exports]
    assert layers == [[range(i, i + 1)] for i in range(4)]
    assert [job.id for job in deployment.transport.jobs[-4:]] == [
        job.id for jobs in step.exports for job in jobs
    ]
    deployment.run()
    assert [early.output, late.output] == [expected(early), expected(late)]


def test_only_what_is_missing_moves():
    deployment = deployed(prefix_cache=True)
    first = deployment.submit("a", prompt_len=17)
    deployment.run()
    second = deployment.submit("b", prompt_len=18)
    deployment.run()
    assert [first.output, second.output] == [expected(first), expected(second)]
    assert second.cached_tokens == 17  # the prefill side had four pages of it, and a copied one
    assert deployment.transport.pages_moved == 5 + 1  # and so had the decode side
    assert deployment.recorder.request(second).transfer.pages_skipped == 4


def test_requests_of_different_salts_share_nothing_on_either_side():
    deployment = deployed(prefix_cache=True)
    cached: list[tuple[int, int]] = []
    for name, salt in enumerate((None, "a", "b", "a", None)):
        prompt = tuple(1 + i % (VOCAB - 1) for i in range(17))
        params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
        request = Request(f"{name}", prompt, params, 0.0, cache_salt=salt)
        [sequence] = deployment.coordinator.submit(request)
        deployment.run()
        assert sequence.output == expected(sequence)
        skipped = deployment.recorder.request(sequence).transfer.pages_skipped
        cached.append((sequence.cached_tokens, skipped))
    assert cached == [(0, 0), (0, 0), (0, 0), (16, 4), (16, 4)]


def test_tokens_may_be_made_on_the_prefill_side_first():
    deployment = deployed(after_tokens=3)
    sequence = deployment.submit("a", prompt_len=6, max_tokens=8)
    deployment.run()
    assert sequence.output == expected(sequence)
    assert deployment.recorder.engines["prefill/0"].steps == 4
    assert deployment.recorder.engines["decode/0"].steps == 4
    assert sent(deployment) == [(0, 4, 3)]  # six tokens of the prompt and three more


def test_short_prompts_never_move():
    deployment = deployed(stay_below=6)
    short, long = deployment.submit("a", prompt_len=5), deployment.submit("b", prompt_len=6)
    deployment.run()
    assert [short.output, long.output] == [expected(short), expected(long)]
    assert deployment.transport.pages_moved == 2
    [moved] = deployment.transport.jobs
    assert route(moved) == ("hbm/prefill-0", "hbm/decode-0")


def test_an_answer_goes_back_and_the_next_turn_uses_it():
    deployment = deployed(prefix_cache=True, give_back=True)
    first = deployment.submit("a", prompt_len=8, max_tokens=9)
    deployment.run()
    there_and_back = [("hbm/prefill-0", "hbm/decode-0"), ("hbm/decode-0", "hbm/prefill-0")]
    assert list(map(route, deployment.transport.jobs)) == there_and_back
    assert deployment.transport.jobs[-1].pages == 2  # of four, two are there already
    turn = replace(first.request, id="b", prompt_token_ids=(*first.token_ids, 5))
    [second] = deployment.coordinator.submit(turn)
    deployment.run()
    assert second.output == expected(second)
    assert second.cached_tokens == 16


def test_a_sequence_moves_to_an_engine_that_has_more_room():
    deployment = deployed(stages=(1, 2), rebalance=True)
    every = [deployment.submit(name, prompt_len=5, max_tokens=30) for name in "abcd"]
    deployment.run_until(lambda: all(sequence.state is State.DECODING for sequence in every))
    for sequence in every:
        if sequence.engine == EngineId("decode/1"):
            deployment.coordinator.abort(sequence.request.id)
    deployment.run()
    assert ("hbm/decode-0", "hbm/decode-1") in map(route, deployment.transport.jobs)
    stayed = [sequence for sequence in every if sequence.state is State.FINISHED]
    assert len(stayed) == 2
    assert [sequence.output for sequence in stayed] == [expected(each) for each in stayed]
    assert all(sequence.epoch <= 1 for sequence in stayed)


def test_a_sequence_that_decodes_comes_before_one_that_will():
    deployment = deploy(CONFIG, pages=(40, 11))
    old = deployment.submit("old", prompt_len=15, max_tokens=20)
    deployment.run_until(lambda: old.state is State.DECODING)
    young = deployment.submit("young", prompt_len=17, max_tokens=3)
    deployment.run()
    assert old.epoch == 0
    assert [old.output, young.output] == [expected(old), expected(young)]


def test_pages_of_other_sizes():
    for size in (2, 8):
        deployment = deploy(CONFIG, decode_page_size=size, groups=2)
        sequences = [deployment.submit(f"{n}", prompt_len=n) for n in (1, 7, 8, 17)]
        deployment.run()
        assert [each.output for each in sequences] == [expected(each) for each in sequences]


def test_a_hand_off_with_parts_missing_cannot_be_completed():
    deployment = deployed(streaming=False)
    sequence = deployment.submit("a")
    deployment.run_until(lambda: sequence.state is State.TRANSFERRING)
    handoff: Handoff = sequence.handoff
    assert not handoff.leave_if_complete() and not handoff.closed


def view(engine: int, free_rows: int, free_pages: int = 20) -> EngineView:
    pools = frozenset(decode_view(i).pool for i in range(2))
    return decode_view(engine, free_rows=free_rows, free_pages=free_pages, sources=pools)


@pytest.mark.parametrize(
    ("engines", "goes_to"),
    [
        ([view(0, 0), view(1, 2)], "decode/1"),
        ([view(0, 1), view(1, 2)], None),  # it would only turn round
        ([view(0, 0), view(1, 2, free_pages=2)], None),
        ([view(0, 0)], None),
        ([view(0, 0), replace(view(1, 2), pool=view(0, 0).pool)], None),  # nothing would move
        ([view(0, 0), replace(view(1, 2), sources=frozenset())], None),  # no link
    ],
)
def test_which_sequence_migrates(engines, goes_to):
    deployment = deployed()
    sequences = [deployment.submit(name, prompt_len=size) for name, size in (("a", 9), ("b", 5))]
    rules = HandoffRules(PolicySetup(Config(handoff=HandoffConfig(rebalance=True))))
    decoding = {EngineId("decode/0"): sequences, EngineId("decode/1"): []}
    plan = rules.migrations(engines, decoding, [], 0, NOW)
    assert [(each.sequence, each.engine) for each in plan] == (
        [] if goes_to is None else [(sequences[1], goes_to)]
    )
    assert not rules.migrations(engines, decoding, [], 1, NOW), "one at a time"
    assert not rules.migrations(engines, decoding, sequences[:1], 0, NOW), "a sequence waits"


@pytest.mark.parametrize("rules", [{"stay_below": 100}, {"after_tokens": 30}])
def test_no_sequence_that_stays_stands_still(rules):
    """Two places of a step for four sequences that decode where they were prefilled: each has its
    turn."""
    deployment = deployed(**rules)
    every = [deployment.submit(name, prompt_len=4, max_tokens=15) for name in "abcd"]
    deployment.run_until(lambda: all(len(sequence.output) >= 2 for sequence in every))
    while not any(sequence.done for sequence in every):
        before = [len(sequence.output) for sequence in every]
        for _ in range(3):
            deployment.coordinator.step()
        after = [len(sequence.output) for sequence in every]
        assert all(now > then for now, then in zip(after, before, strict=True)), (before, after)
    deployment.run()
    assert [sequence.output for sequence in every] == [expected(sequence) for sequence in every]
