"""What one request holds never changes another's tokens: rows are islands, also where an embedding
is not finite. A request whose logits are not finite fails with that reason, and leaves no page that
anybody finds."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from pdjax.config import KVConfig, ModelConfig
from pdjax.core.outputs import RequestOutput
from pdjax.core.request import SamplingParams
from pdjax.device import builder as build
from pdjax.device.models.weights import random_params
from pdjax.llm import LLM
from tests.helpers.promise import COLD, MONOLITHIC, SPEC, conserved, disaggregated

POISON = {84: np.nan, 85: np.inf, 86: -np.inf, 87: 3e38}
"""Token -> what its embedding is full of."""

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.9, top_k=30, seed=5, max_tokens=6, ignore_eos=True, logprobs=2)
HEALTHY: list[tuple[list[int], SamplingParams]] = [
    ([1], GREEDY),
    ([5, 6, 7], DRAWN),
    (list(range(10, 29)), GREEDY),  # two chunks
    ([40, 3, 2, 44, 60], GREEDY),
]
LAYOUTS: dict[str, Any] = {
    "colocated": MONOLITHIC,
    "pipeline of int8": disaggregated(2, 2, 1, 2, kv_dtype="int8"),
}


class Served(NamedTuple):
    """A model with poisoned embeddings, and what it answers to each of HEALTHY alone."""

    llm: LLM
    alone: list[list[int]]


def answers(llm: LLM, asked: list[tuple[list[int], SamplingParams]]) -> list[RequestOutput]:
    prompts, params = zip(*asked, strict=True)
    outputs = llm.generate(list(prompts), list(params))
    conserved(llm)
    return outputs


def poisoned_params(*args: Any) -> Any:
    params: Any = random_params(*args)

    @jax.jit
    def poisoned(embed: jax.Array) -> jax.Array:
        for token, value in POISON.items():
            embed = embed.at[token].set(value)
        return jax.lax.with_sharding_constraint(embed, params.embed.sharding)

    return replace(params, embed=poisoned(params.embed))


@pytest.fixture(scope="module", params=LAYOUTS)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    config = replace(
        LAYOUTS[request.param],
        model=ModelConfig(source="random", spec=replace(SPEC, num_layers=2)),
        kv=KVConfig(page_size=4, prefix_cache=True),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "random_params", poisoned_params)
        with LLM(config, COLD) as llm:
            alone = [output for asked in HEALTHY for output in answers(llm, [asked])]
            assert all(output.choices[0].error is None for output in alone), "choose other tokens"
            yield Served(llm, [output.token_ids for output in alone])


def failed(output: RequestOutput) -> bool:
    error = output.choices[0].error
    return output.finish_reason == "error" and "logits are not finite" in str(error)


def findable(llm: LLM, tokens: list[int]) -> int:
    """How many of their pages the index of any pool finds."""
    pools = llm.coordinator.loop.fleet.pools.values()
    indices = [pool.prefixes for pool in pools if pool.prefixes is not None]
    assert indices
    return max(len(index.match(index.keys(tokens))) for index in indices)


@pytest.mark.parametrize("token", POISON)
def test_neighbours_of_poison_are_right(served: Served, token: int):
    """In one prefill step, in the chunks of a long prompt, and in decode rows."""
    llm, alone = served
    poisoned = [[token], [2, token, 4], [*range(50, 68), token, *range(60, 75)]]
    asked = [x for i, prompt in enumerate(poisoned) for x in ((prompt, GREEDY), HEALTHY[i])]
    outputs = answers(llm, [*asked, HEALTHY[3]])
    assert [outputs[i].token_ids for i in (1, 3, 5, 6)] == alone
    assert all(outputs[i].choices[0].error is None for i in (1, 3, 5, 6))
    for i, prompt in zip((0, 2, 4), poisoned, strict=True):
        assert failed(outputs[i]), (prompt, outputs[i])
        assert outputs[i].token_ids == []
        assert findable(llm, prompt) == 0


def test_a_row_that_is_poisoned_while_it_decodes_fails_alone(served: Served):
    """Of many answers some have a poisoned token in them, which is their last."""
    llm, alone = served
    longer = replace(GREEDY, max_tokens=12)
    crowd = [[first, 41, 42] for first in range(30)]
    outputs = answers(llm, [*HEALTHY, *((prompt, longer) for prompt in crowd)])
    assert [output.token_ids for output in outputs[: len(HEALTHY)]] == alone
    doomed = 0
    for prompt, output in zip(crowd, outputs[len(HEALTHY) :], strict=True):
        *before, last = output.token_ids
        assert not POISON.keys() & set(before)
        if output.choices[0].error is None:
            assert len(output.token_ids) == 12
            continue
        assert failed(output) and last in POISON
        assert findable(llm, [*prompt, *output.token_ids]) == 0
        doomed += 1
    assert 0 < doomed < len(crowd)


def test_a_prefix_before_poison_serves_others_rightly(served: Served):
    llm, _ = served
    once = replace(GREEDY, max_tokens=1, logprobs=3)
    prefix = [70, 71, 72, 73, 74, 75, 76, 77]  # two pages
    sound, poisoned = [*prefix, 1, 2], [*prefix, 84, 9, 9, 9, 9]
    [first] = answers(llm, [(poisoned, GREEDY)])
    assert failed(first) and findable(llm, poisoned) == 0
    [before] = answers(llm, [(sound, once)])
    assert before.choices[0].error is None and before.metrics.cached_tokens == 0
    [again] = answers(llm, [(poisoned, GREEDY)])
    assert failed(again) and findable(llm, poisoned) == 2, "the prefix is another's"
    [after] = answers(llm, [(sound, once)])
    assert (after.token_ids, after.logprobs) == (before.token_ids, before.logprobs)
    assert after.metrics.cached_tokens == 8
