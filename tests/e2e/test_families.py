"""Models of every family answer as transformers does, through a tensor-parallel prefill, a
hand-off, staged decode, a prefix cache and preemption."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pdjax.config import ModelConfig
from pdjax.core.request import SamplingParams
from pdjax.llm import LLM
from tests.helpers import tiny_models
from tests.helpers.promise import COLD, conserved, disaggregated, preemptions
from tests.parity import family_tokens

GREEDY = SamplingParams(temperature=0.0, max_tokens=family_tokens.NEW_TOKENS, ignore_eos=True)


SHARDS: dict[str, dict[str, Any]] = {"mixtral": {"prefill.experts": "whole"}}
"""Of a mixture whose shards of prefill have whole experts; those of the other have parts of all."""


@pytest.mark.parametrize("name", family_tokens.MODELS)
def test_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path):
    """Two stages of three layers: the second pads. 24 pages of 4 tokens hold two sequences."""
    directory = tiny_models.write(name, tmp_path)
    config = disaggregated(2, 2, 1, groups=2, pages=25)
    config = replace(config, model=ModelConfig(source=str(directory)))
    prompts, expected = family_tokens.prompts(), family_tokens.answers(name)
    with LLM(config, COLD | {"kv.prefix_cache": True} | SHARDS.get(name, {})) as llm:
        answers = [answer.token_ids for answer in llm.generate(prompts, GREEDY)]
        assert answers == expected
        assert preemptions(llm) > 0
        [again] = llm.generate(prompts[:1], GREEDY)
        assert again.token_ids == expected[0]
        assert again.metrics.cached_tokens > 0
        conserved(llm)
        assert llm.recorder.transfers.transfers > 0
