"""Guided answers: exactly those of a loop over the logits of whole texts, beside neighbours that do
not notice them. `test_promise` has masks in every layout."""

import json
from dataclasses import replace

import numpy as np
import pytest

from pdjax.core.guide import Guide
from pdjax.core.request import SamplingParams
from pdjax.llm import LLM
from tests.helpers.guided import SCHEMA, give_text, greedy
from tests.helpers.promise import (
    COLD,
    MONOLITHIC,
    SPEC,
    answers,
    conserved,
    disaggregated,
    expected,
    preemptions,
    workload,
)

PROMPTS = np.random.default_rng(4).integers(0, SPEC.vocab_size, (4, 9)).tolist()
GUIDES = [
    SCHEMA,
    Guide.regex("[ab]{3,12}c?"),
    Guide.choices(["yes", "no", "yesterday"]),
    Guide.grammar('start: "(" start ")" | /[0-9]+/'),
]


def guided(**further) -> list[SamplingParams]:
    how = {"temperature": 0.0, "max_tokens": 16} | further
    return [SamplingParams(guide=guide, **how) for guide in GUIDES]


@pytest.fixture(scope="module")
def llm():
    with LLM(disaggregated(2, 2, 1), COLD) as made:
        give_text(made)
        yield made


def check(llm: LLM) -> None:
    """Guided answers are those of a plain loop, alone and beside others, which have their own."""
    right = [greedy(*each) for each in zip(PROMPTS, guided(), strict=True)]
    alone = llm.generate(PROMPTS, guided())
    assert [output.token_ids for output in alone] == right
    assert {output.finish_reason for output in alone} == {"stop", "length"}
    prompts, params = map(list, zip(*workload(), strict=True))
    beside = llm.generate([*prompts, *PROMPTS], [*params, *guided()])
    theirs = [[choice.token_ids for choice in each.choices] for each in beside]
    assert theirs == [*expected(), *([tokens] for tokens in right)]
    conserved(llm)


def test_guided_answers_are_those_of_a_plain_loop(llm: LLM):
    check(llm)


def test_preemption_changes_no_guided_answer():
    with LLM(disaggregated(1, 3, 1, 3, pages=15), COLD) as llm:
        give_text(llm)
        check(llm)
        assert preemptions(llm) > 0


def test_drawn_and_penalized_choices_keep_the_form(llm: LLM):
    params = SamplingParams(
        temperature=1.0, seed=3, max_tokens=60, guide=SCHEMA, n=3, frequency_penalty=0.5, logprobs=2
    )
    [output] = llm.generate([PROMPTS[0]], params)
    assert len({choice.text for choice in output.choices}) > 1
    for choice in output.choices:
        if choice.finish_reason == "stop":
            assert json.loads(choice.text).keys() == {"a", "b"}
        assert choice.logprobs is not None and len(choice.logprobs) == len(choice.token_ids)


def test_a_text_that_may_go_on_ends_with_an_end_token_unless_that_is_ignored(llm: LLM):
    [end] = SPEC.eos_token_ids
    asked = SamplingParams(
        temperature=0.0, max_tokens=5, guide=Guide.regex("a+"), logit_bias={end: 100}
    )
    each = [asked, replace(asked, ignore_eos=True)]
    first, second = llm.generate([PROMPTS[0]] * 2, each)
    assert (first.text, first.finish_reason, first.token_ids[-1]) == ("a", "stop", end)
    assert (second.text, second.finish_reason) == ("aaaaa", "length")


def test_a_guide_that_leaves_no_token_is_refused(llm: LLM):
    for refused, message in (
        ({"guide": Guide.regex("[")}, "guide: the regular expression can't be followed: .*"),
        (
            {"guide": Guide.json_schema({"type": "cat"})},
            "guide: the JSON schema can't be followed: .*cat",
        ),
        (
            {"guide": Guide.choices(["é"])},
            "guide: the choices .*: no token of the vocabulary goes on",
        ),
        ({"guide": Guide.regex("a"), "allowed_token_ids": [0]}, "together they allow no token"),
        ({"allowed_token_ids": [SPEC.vocab_size]}, "allowed_token_ids: 101 is not a token id"),
        ({"logit_bias": {SPEC.vocab_size: 1}}, "logit_bias: 101 is not a token id"),
    ):
        with pytest.raises(ValueError, match=message):
            llm.generate([PROMPTS[0]], SamplingParams(**refused))
    with LLM(MONOLITHIC, COLD) as without, pytest.raises(ValueError, match="has no tokenizer"):
        without.generate([PROMPTS[0]], SamplingParams(guide=SCHEMA))
    assert answers(llm) == expected()
