"""A conversation whose KV is evicted between any two of its turns, and comes up from a tier."""

from dataclasses import replace

import numpy as np
import pytest

from pdjax.config import Config, ModelConfig, PoliciesConfig, TiersConfig
from pdjax.core.request import SamplingParams
from pdjax.llm import LLM
from tests.helpers.promise import COLD, MONOLITHIC, SPEC, conserved

PAGE = MONOLITHIC.kv.page_size
SMALL = replace(
    MONOLITHIC,
    model=ModelConfig(source="random", spec=replace(SPEC, num_layers=2)),
    prefill=replace(MONOLITHIC.prefill, pages=9),
    decode=replace(MONOLITHIC.decode, pages=9),
)
"""A pool of 16 pages: one context and no page more."""
TIERED = replace(
    SMALL,
    kv=replace(MONOLITHIC.kv, prefix_cache=True),
    policies=PoliciesConfig(tiering="always"),
    tiers=TiersConfig(host_gb=1e-3),
)

TURNS = 5


def conversation(llm: LLM) -> list[tuple[list[int], int]]:
    """Of each turn the answer, and the prompt tokens that were found. Another prompt fills all
    pages between any two turns."""
    said = np.random.default_rng(5).integers(0, SPEC.vocab_size, (TURNS, 5)).tolist()
    filler = np.random.default_rng(6).integers(0, SPEC.vocab_size, 62).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    context, turns = list[int](), list[tuple[list[int], int]]()
    for i, words in enumerate(said):
        context += words
        [output] = llm.generate([context], params)
        turns.append((output.token_ids, output.metrics.cached_tokens))
        context += output.token_ids
        llm.generate([[i, *filler]], replace(params, max_tokens=1))
        conserved(llm)
    return turns


@pytest.mark.smoke
def test_a_turn_computes_only_what_is_new():
    with LLM(SMALL, COLD) as llm:
        expected = [answer for answer, _ in conversation(llm)]
    with LLM(TIERED, COLD) as llm:
        turns = conversation(llm)
        [totals] = llm.coordinator.loop.tiers.totals.values()
    assert [answer for answer, _ in turns] == expected
    # Of a turn that ends with t tokens, t - 1 have KV, in (t - 1) // PAGE whole pages.
    ends = [11 * (turn + 1) for turn in range(TURNS - 1)]
    assert [found for _, found in turns] == [0, *((end - 1) // PAGE * PAGE for end in ends)]
    assert totals.hit_tokens == sum(found for _, found in turns), "all of it was evicted before"
    assert totals.failed_pages == totals.refused_pages == totals.failed_loads == 0


def test_a_tier_without_prefixes_or_without_room_is_refused():
    with pytest.raises(ValueError, match=r"^tiers.host_gb=1: needs kv.prefix_cache=True"):
        replace(SMALL, tiers=TiersConfig(host_gb=1))
    for size in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=r"^tiers.host_gb=.*gigabytes above 0$"):
            TiersConfig(host_gb=size)

    def refused(size: float) -> Config:
        return replace(TIERED, tiers=TiersConfig(host_gb=size))

    with pytest.raises(ValueError, match=r"^tiers.host_gb=1e-09: holds no page, of which one has"):
        LLM(refused(1e-9), COLD)
    with pytest.raises(ValueError, match=r"^tiers.host_gb=1000000.0: must be at most what the"):
        LLM(refused(1e6), COLD)
