"""Shared parts of the end-to-end tests: a small random model that every layout can cut, a workload
that is hard for schedulers, and its answers from one device without a hand-off."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from pdjax.config import (
    Config,
    DecodeConfig,
    HandoffConfig,
    KVConfig,
    ModelConfig,
    PrefillConfig,
)
from pdjax.core.model_spec import ModelSpec
from pdjax.core.request import SamplingParams
from pdjax.llm import LLM

COLD = {"warm_up": False}
"""A change of a config: only what a workload needs is compiled, at its first use. A warm-up has a
test of its own in `test_device_discipline`."""

SPEC = ModelSpec(
    vocab_size=101,  # prime: no number of shards divides it
    num_layers=5,  # prime: no number of stages divides it; more would only compile longer
    model_dim=48,
    mlp_dim=96,
    query_heads=24,
    kv_heads=12,  # every tp of 1, 2, 3, 4 divides it
    head_dim=4,
    context=64,
    eos_token_ids=(7,),
)

MONOLITHIC = Config(
    model=ModelConfig(source="random", spec=SPEC),
    kv=KVConfig(page_size=4, prefix_cache=False),
    prefill=PrefillConfig(
        token_budget=16, max_sequences=4, token_buckets=(16,), page_buckets=(32,)
    ),
    decode=DecodeConfig(rows=4, row_buckets=(4,), page_buckets=(16,)),
    colocated=True,
    max_logprobs=3,
)
"""One device, one pool, nothing kept; prompts longer than 16 tokens take several chunks. Every tick
computes all rows, since each other number compiles programs of its own; tests of that give row
buckets."""

PROMPT_LENS = (1, 3, 4, 5, 16, 17, 40, 2, 33, 8, 1, 21)
"""Lengths around a page, around a chunk, and of several chunks; three times as many requests as
rows."""


def disaggregated(tp_p: int, stages: int, tp_d: int, groups: int = 2, **decode: Any) -> Config:
    """Make a config of the same model with prefill on tp_p devices, in `groups` layer groups, and
    decode on stages x tp_d others; prefixes are kept."""
    rows = {1: 4, 2: 4, 3: 6, 4: 4, 5: 5}[stages]
    return replace(
        MONOLITHIC,
        colocated=False,
        kv=replace(MONOLITHIC.kv, prefix_cache=True),
        prefill=replace(MONOLITHIC.prefill, tp=tp_p),
        handoff=HandoffConfig(layer_groups=groups),
        decode=replace(
            MONOLITHIC.decode, **({"stages": stages, "tp": tp_d, "rows": rows} | decode)
        ),
    )


def workload() -> list[tuple[list[int], SamplingParams]]:
    """Make prompts with their params: greedy, sampled, filtered, penalized, constrained, with
    several ends."""
    rng = np.random.default_rng(11)
    kinds = (
        SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=5, max_tokens=9),
        SamplingParams(temperature=0.0, max_tokens=20, stop_token_ids=range(20), ignore_eos=True),
        SamplingParams(temperature=0.8, top_p=0.9, top_k=40, seed=2**40 + 1, max_tokens=14),
        SamplingParams(temperature=0.0, max_tokens=12, repetition_penalty=1.5, ignore_eos=True),
        SamplingParams(temperature=1.2, min_p=0.01, seed=3, frequency_penalty=0.9, max_tokens=10),
        SamplingParams(temperature=0.0, max_tokens=1),
        SamplingParams(temperature=0.9, seed=8, max_tokens=6, n=2),
        SamplingParams(temperature=0.0, max_tokens=12, allowed_token_ids=range(3, 101, 4)),
        SamplingParams(temperature=1.0, seed=5, max_tokens=9, logit_bias={3: 5, 7: -100, 100: 6}),
        SamplingParams(temperature=0.0, max_tokens=12, min_tokens=5, stop_token_ids=range(50)),
        SamplingParams(temperature=0.9, seed=6, max_tokens=9, allowed_token_ids=[3, 8, 9]),
    )
    prompts = [rng.integers(0, SPEC.vocab_size, length).tolist() for length in PROMPT_LENS]
    return [(prompt, kinds[i % len(kinds)]) for i, prompt in enumerate(prompts)]


def answers(llm: LLM) -> list[list[list[int]]]:
    """Return the token ids of each choice of each request of the workload; check that all pages are
    free afterwards."""
    prompts, params = zip(*workload(), strict=True)
    outputs = llm.generate(list(prompts), list(params))
    assert all(choice.error is None for output in outputs for choice in output.choices)
    conserved(llm)
    return [[choice.token_ids for choice in output.choices] for output in outputs]


def crowded(llm: LLM) -> list[list[int]]:
    """Return the token ids of four answers that grow side by side, into 12 pages of 4 tokens each.

    The answers are so long that they overlap at any timing. Check that all pages are free
    afterwards.
    """
    prompts = np.random.default_rng(3).integers(0, SPEC.vocab_size, (4, 8)).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    outputs = llm.generate(prompts, params)
    conserved(llm)
    return [output.token_ids for output in outputs]


def preemptions(llm: LLM) -> int:
    """Return the number of preemptions so far."""
    return sum(metrics.preemptions for metrics in llm.recorder.requests())


def conserved(llm: LLM) -> None:
    """Wait for all work in flight; then check that every page of every pool is free."""
    while llm.has_work:
        llm.step()
    llm.coordinator.check()


@cache
def expected() -> list[list[list[int]]]:
    """Return the answers of the one-device configuration."""
    with LLM(MONOLITHIC, COLD) as llm:
        return answers(llm)


@cache
def expected_of_a_crowd() -> list[list[int]]:
    """Return the answers of the one-device configuration to `crowded`."""
    with LLM(MONOLITHIC, COLD) as llm:
        return crowded(llm)
