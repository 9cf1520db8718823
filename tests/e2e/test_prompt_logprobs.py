"""Log-probabilities of prompts compared with transformers, whichever way a prompt takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pdjax.config import Config, DecodeConfig, HandoffConfig, KVConfig, ModelConfig, PrefillConfig
from pdjax.core.outputs import RequestOutput
from pdjax.core.request import SamplingParams
from pdjax.llm import LLM
from tests.helpers import tiny_models
from tests.helpers.promise import COLD, conserved

NAME, TOP = "smollm2", 3
PROMPT = tiny_models.tokens(NAME).tolist()
DISAGGREGATED = Config(
    kv=KVConfig(page_size=4, prefix_cache=True),
    prefill=PrefillConfig(
        tp=2, token_budget=10, max_sequences=4, token_buckets=(16,), page_buckets=(16,)
    ),
    decode=DecodeConfig(rows=4, page_buckets=(10,)),
    handoff=HandoffConfig(layer_groups=2),
    max_logprobs=TOP,
)
"""Chunks of ten tokens, in two layer groups, over two shards."""
COLOCATED = replace(
    DISAGGREGATED,
    prefill=replace(DISAGGREGATED.prefill, tp=1, token_budget=32, token_buckets=(32,)),
    handoff=HandoffConfig(),
    colocated=True,
)
"""Two prompts in one step, which is one program."""


@contextmanager
def serving(config: Config, folder: Path) -> Iterator[LLM]:
    source = str(tiny_models.write(NAME, folder))
    with LLM(replace(config, model=ModelConfig(source=source, max_model_len=40)), COLD) as llm:
        yield llm
        conserved(llm)


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """Log-probabilities [T, V] of transformers: float32, on the CPU."""
    with np.load(Path(__file__).parents[1] / "parity" / "fixtures" / "tiny_logits.npz") as file:
        logits = file[NAME].astype(np.float64)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def check(output: RequestOutput, expected: np.ndarray, most: int = TOP) -> None:
    found = output.prompt_logprobs
    assert found is not None and found[0] is None
    assert len(found) == len(output.prompt_token_ids)
    for place, entry in enumerate(found[1:], start=1):
        row, token = expected[place - 1], output.prompt_token_ids[place]
        assert entry is not None and entry.token == token
        assert entry.chosen == pytest.approx(row[token], abs=1e-4)
        assert entry.rank == 1 + (row > row[token]).sum()
        best = np.argsort(-row)[:most].tolist()
        assert [other for other, _ in entry.top] == best
        assert [value for _, value in entry.top] == pytest.approx(row[best], abs=1e-4)


@pytest.mark.parametrize("config", [DISAGGREGATED, COLOCATED])
def test_they_are_those_of_transformers(config: Config, tmp_path: Path, expected: np.ndarray):
    """Together with requests that do not ask, of which nothing changes; and with and without what
    the prefix cache has."""
    most = 1 if config is COLOCATED else 3
    asks = SamplingParams(
        temperature=0.0, max_tokens=most, ignore_eos=True, prompt_logprobs=TOP, logprobs=TOP
    )
    plain = replace(asks, prompt_logprobs=None)
    with serving(config, tmp_path) as llm:
        [before] = llm.generate([PROMPT], plain)
        prompts = [PROMPT, PROMPT[:3], PROMPT, PROMPT[:20], PROMPT[:1]]
        params = [asks, replace(asks, prompt_logprobs=0), plain, asks, asks]
        outputs = llm.generate(prompts, params)
        [after] = llm.generate([PROMPT], plain)
        [longer] = llm.generate([[*PROMPT, *before.token_ids]], replace(asks, max_tokens=1))
    for index, top in ((0, TOP), (1, 0), (3, TOP), (4, TOP)):
        check(outputs[index], expected, top)
    assert before.prompt_logprobs is None and outputs[2].prompt_logprobs is None
    assert outputs[0].token_ids == outputs[2].token_ids == before.token_ids == after.token_ids
    assert outputs[0].metrics.cached_tokens == 0, "what asks is computed whole"
    assert after.metrics.cached_tokens > 0, "and is found by others"
    # What a step chose is what the scores of a longer prompt say of it.
    assert before.logprobs is not None and longer.prompt_logprobs is not None
    for chosen, scored in zip(before.logprobs, longer.prompt_logprobs[-most:], strict=True):
        assert scored is not None and scored.rank == 1
        assert scored.chosen == pytest.approx(chosen.chosen, abs=1e-4)
        assert [token for token, _ in scored.top] == [token for token, _ in chosen.top]
