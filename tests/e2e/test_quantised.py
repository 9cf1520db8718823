"""Decode pools of int8 and float8: what they hold is rounded once, and nothing else makes a
difference."""

from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from pdjax.core.request import SamplingParams
from pdjax.device.mesh import PREFILL_RULES, make_mesh
from pdjax.device.models.weights import random_params
from pdjax.llm import LLM
from tests.helpers.dense import dense_logits
from tests.helpers.promise import (
    COLD,
    SPEC,
    answers,
    crowded,
    disaggregated,
    preemptions,
    workload,
)

pytestmark = pytest.mark.usefixtures("few_variants")

DTYPES = ("int8", "float8_e4m3fn")


@cache
def baseline(dtype: str) -> list[list[list[int]]]:
    """The answers of one device for each phase."""
    with LLM(disaggregated(1, 1, 1, kv_dtype=dtype), COLD) as llm:
        return answers(llm)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_sees_what_was_rounded_once(dtype):
    """Log-probabilities are those of a whole forward in which each token after the prompt sees all
    K and V rounded, its own too; tokens of the prompt see them exactly."""
    greedy = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=0)
    prompts = [prompt for prompt, _ in workload() if 3 <= len(prompt) <= 33]
    with LLM(disaggregated(2, 2, 1, 3, kv_dtype=dtype), COLD) as llm:
        outputs = llm.generate(prompts, greedy)
        seed = llm.config.seed
    layers = (tuple(range(SPEC.num_layers)),)
    mesh = make_mesh(jax.devices()[:1], 1, 1)
    params = random_params(SPEC, mesh, PREFILL_RULES, layers, "float32", seed)
    errors = []
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = [*prompt, *output.token_ids]
        whole: Any = np.zeros(SPEC.context, np.int32)
        whole[: len(tokens)] = tokens
        at = np.arange(len(prompt) - 1, len(tokens) - 1), whole[len(prompt) : len(tokens)]
        got = [each.chosen for each in output.logprobs or []]
        for rounded in (dtype, None):
            logits = dense_logits(params, whole, spec=SPEC, rounded=rounded, exact=len(prompt))
            errors.append(np.abs(np.asarray(jax.nn.log_softmax(logits))[at] - got).max())
    like_this, exact = np.array(errors).reshape(-1, 2).T
    # Sums in another order make another element of what lies halfway between two.
    assert np.median(like_this) < 1e-3
    assert (like_this < exact / 10).all()


VARIANTS: dict[str, dict[str, Any]] = {
    "in bulk, checked, with its own wire": {
        "handoff.streaming": False,
        "handoff.checksums": True,
        "handoff.wire_dtype": "int8",
    },
    "larger pages": {"decode.page_size": 8},
    "smaller pages": {"decode.page_size": 1, "decode.page_buckets": (64,)},
    "sideways": {"decode.engines": 2, "handoff.rebalance": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_no_way_of_moving_changes_a_token(name):
    with LLM(disaggregated(2, 2, 2, 3, kv_dtype="int8"), COLD | VARIANTS[name]) as llm:
        assert answers(llm) == baseline("int8")


def test_preemption_goes_on_over_exact_kv():
    """A preempted sequence is prefilled anew over exact KV, so tokens may differ; everyone is
    answered, nothing leaks, and whoever was not preempted has the same tokens."""
    with LLM(disaggregated(1, 1, 1, kv_dtype="int8", pages=15), COLD) as llm:
        got = answers(llm)
        preempted = preemptions(llm)
        assert [len(tokens) for tokens in crowded(llm)] == [40] * 4
        assert preemptions(llm) > preempted
    same = [
        a == b
        for ours, theirs in zip(got, baseline("int8"), strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    assert same.count(False) <= preempted
