"""Log-probabilities of prompts, a few positions a call."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdjax.core.kv_layout import split_layers
from pdjax.device.mesh import PREFILL_RULES, make_mesh
from pdjax.device.models.decoder import Params
from pdjax.device.models.weights import random_params
from pdjax.device.steps.score import MOST_SLICES, SLICE, make_score_step, pack
from pdjax.interfaces.batches import ScoreBatch
from tests.helpers.promise import SPEC

TOKENS, TOP = 1200, 4


def softmax_of(params: Params, x: jax.Array) -> np.ndarray:
    """Log-probabilities [T, V] worked out in float64."""
    exact = np.asarray(x, np.float64)
    exact /= np.sqrt((exact * exact).mean(1, keepdims=True) + SPEC.norm_eps)
    unembed = np.asarray(params.unembed, np.float64)[:, : SPEC.vocab_size]
    logits = (exact * np.asarray(params.final_norm, np.float64)) @ unembed
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


@pytest.mark.parametrize("tp", [1, 2])
def test_slices_of_a_long_prompt_are_what_the_whole_would_be(tp: int):
    mesh = make_mesh(jax.devices()[:tp], 1, tp)
    params = random_params(
        SPEC, mesh, PREFILL_RULES, split_layers(SPEC.num_layers, 1), "float32", seed=3
    )
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(TOKENS, SPEC.model_dim)), "float32")
    at = np.delete(np.arange(TOKENS, dtype=np.int32), [5, 200])
    targets = rng.integers(0, SPEC.vocab_size, len(at), dtype=np.int32)
    outer = replace(params, layers=[])
    step = make_score_step(params, SPEC, tp, TOP)
    calls = [step(outer, x, packed) for packed in pack(ScoreBatch(at, targets), TOKENS)]
    assert [len(call.ranks) for call in calls] == [MOST_SLICES * SLICE, SLICE, SLICE]
    ranks, chosen, ids, top = (
        np.concatenate([np.asarray(part) for part in parts])[: len(at)]
        for parts in zip(
            *((c.ranks, c.logprobs.chosen, c.logprobs.top_ids, c.logprobs.top) for c in calls),
            strict=True,
        )
    )
    expected = softmax_of(params, x)[at]
    theirs = np.take_along_axis(expected, targets[:, None], 1)
    np.testing.assert_allclose(chosen, theirs[:, 0], atol=1e-5)
    np.testing.assert_array_equal(ranks, 1 + (expected > theirs).sum(1))
    order = np.argsort(-expected, axis=1)[:, :TOP]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(top, np.take_along_axis(expected, order, 1), atol=1e-5)


def test_a_short_step_takes_one_call_of_its_own_size():
    [packed] = pack(ScoreBatch(np.array([1], np.int32), np.array([7], np.int32)), 16)
    assert packed.fields == (("at", "int32", (16,)), ("targets", "int32", (16,)))
    [rehearsal] = pack(None, 16)
    assert rehearsal.fields == packed.fields and not rehearsal.words.any()


def test_a_rehearsal_has_every_size_that_may_come():
    def sizes(scored: ScoreBatch | None, tokens: int) -> list[int]:
        return [packed.fields[0][2][0] for packed in pack(scored, tokens)]

    for tokens in (16, 128, 300, 1023, 1024, 8192):
        known = set(sizes(None, tokens))
        for count in {1, min(tokens, 129), tokens - 1, tokens}:
            many = np.zeros(count, np.int32)
            asked = sizes(ScoreBatch(many, many), tokens)
            assert set(asked) <= known and sum(asked) - min(known) < count <= sum(asked)
