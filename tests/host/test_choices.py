"""Several choices of a request, whose prompt is prefilled once where prefixes are kept."""

from dataclasses import replace

import pytest

from pdjax.config import HandoffConfig, KVConfig, PoliciesConfig
from pdjax.core.guide import Guide
from pdjax.core.request import Request, SamplingParams
from pdjax.host.sequences.sequence import Sequence, State
from tests.helpers.deployment import CONFIG, Deployment, deploy, expected
from tests.helpers.fake_guides import make_guide

PROMPT = tuple(1 + i % 7 for i in range(18))


def several(deployment: Deployment, n: int = 3, length: int = 18, **params) -> list[Sequence]:
    values = {"temperature": 1.0, "max_tokens": 5, "ignore_eos": True, "n": n, **params}
    request = Request("several", PROMPT[:length], SamplingParams(**values), 0.0)
    return deployment.coordinator.submit(request)


def deployed(
    *,
    kept: bool = True,
    handoff: HandoffConfig = CONFIG.handoff,
    router: str = "least_loaded",
    **how,
) -> Deployment:
    config = replace(
        CONFIG,
        kv=KVConfig(prefix_cache=kept),
        handoff=handoff,
        policies=PoliciesConfig(router=router),
        max_waiting=20,
    )
    return deploy(config, **how)


def tokens_prefilled(deployment: Deployment) -> int:
    return sum(
        deployment.recorder.engines[engine.id].sums["tokens"]
        for engine in deployment.prefill
        if engine.id in deployment.recorder.engines
    )


@pytest.mark.parametrize("prefills", [1, 3])
@pytest.mark.parametrize("router", ["least_loaded", "round_robin", "power_of_two"])
def test_the_prompt_is_prefilled_once(prefills, router):
    deployment = deployed(prefills=prefills, router=router)
    choices = several(deployment)
    deployment.run()
    assert [each.output for each in choices] == [expected(each) for each in choices]
    assert [each.cached_tokens for each in choices] == [0, 17, 17]
    # The last page, partly filled, is copied: pages that are shared are never written.
    assert tokens_prefilled(deployment) == 18 + 1 + 1


def test_on_the_decode_side_what_is_there_does_not_move_again():
    deployment = deployed(handoff=HandoffConfig(streaming=False))
    choices = several(deployment, n=2, length=17)
    deployment.run()
    skipped = [deployment.recorder.request(each).transfer.pages_skipped for each in choices]
    assert skipped == [0, 4]


@pytest.mark.parametrize(("kept", "length"), [(False, 18), (True, 4)])
def test_where_nothing_can_be_found_nobody_waits(kept, length):
    deployment = deployed(kept=kept)
    choices = several(deployment, length=length)
    assert deployment.coordinator.loop.lifecycle.waiting[:] == choices
    deployment.run()
    assert [each.output for each in choices] == [expected(each) for each in choices]


def test_the_others_count_as_waiting():
    deployment = deployed()
    several(deployment, n=5)
    lifecycle = deployment.coordinator.loop.lifecycle
    assert (len(lifecycle.waiting), len(lifecycle.held)) == (1, 4)
    assert deployment.coordinator.has_room(15) and not deployment.coordinator.has_room(16)


@pytest.mark.parametrize("state", [State.WAITING, State.PREFILLING])
def test_they_go_on_without_the_first_one(state):
    deployment = deployed()
    choices = several(deployment)
    deployment.run_until(lambda: choices[0].state is state)
    deployment.coordinator.stop("several", 0, 0, "x")
    deployment.run()
    assert [each.output for each in choices] == [[], *map(expected, choices[1:])]


def test_all_end_when_the_request_does():
    deployment = deployed()
    choices = several(deployment)
    deployment.coordinator.abort("several")
    assert {each.state for each in choices} == {State.ABORTED}
    assert not deployment.coordinator.loop.lifecycle.waiting
    assert not deployment.coordinator.loop.lifecycle.held
    deployment.run()


def test_they_do_not_wait_for_a_first_one_that_starts_over():
    deployment = deployed()
    choices = several(deployment)
    deployment.run_until(lambda: choices[0].state is State.PREFILLING)
    deployment.coordinator.loop.lifecycle.preempt(choices[0])
    assert deployment.coordinator.loop.lifecycle.waiting[:] == choices
    deployment.run()
    assert [each.output for each in choices] == [expected(each) for each in choices]


def test_nor_for_one_whose_answer_is_made_on_the_prefill_side():
    deployment = deployed(handoff=HandoffConfig(stay_below=100))
    choices = several(deployment, max_tokens=8)
    deployment.run_until(lambda: len(choices[0].output) > 1)
    assert all(each.state is not State.WAITING or not each.behind for each in choices)
    assert not deployment.coordinator.loop.lifecycle.held
    deployment.run()
    assert [each.output for each in choices] == [expected(each) for each in choices]


def test_choices_of_a_form_wait_for_it_and_for_the_prompt():
    deployment = deployed(make_guide=make_guide)
    guide = Guide.regex("a*")
    choices = several(deployment, guide=guide)
    deployment.run()
    assert [each.cached_tokens for each in choices] == [0, 17, 17]
