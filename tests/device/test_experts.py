"""Layers with experts: what becomes of a token depends on no other one, ties and padding have a
rule, and numbers that cannot be are refused."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdjax.config import Config, ModelConfig
from pdjax.core.moe_spec import MoeSpec
from pdjax.device.models import experts
from pdjax.device.models.experts import route, through_experts
from pdjax.device.models.registry import matrix_params, touched_params
from pdjax.llm import LLM
from tests.helpers.promise import MONOLITHIC

SPEC = MoeSpec(
    vocab_size=11,
    num_layers=2,
    model_dim=16,
    mlp_dim=24,
    query_heads=4,
    kv_heads=2,
    head_dim=4,
    context=32,
    family="qwen3_moe",
    num_experts=4,
    experts_per_token=2,
    expert_mlp_dim=6,
)
TOKENS = 8


def layer(seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = {"router": (16, 4), "w_experts_up": (4, 16, 2, 6), "w_experts_down": (4, 6, 16)}
    made = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return {name: jnp.asarray(w) for name, w in made.items()}


@jax.jit
def computed(layer: Any, x: jax.Array, live: jax.Array) -> jax.Array:
    scale = jnp.ones(TOKENS)
    chosen, shares = route(x, scale, layer["router"], SPEC)
    return through_experts(layer, x, scale, chosen, shares, SPEC, live)


def tokens(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((TOKENS, 16), np.float32)


def test_a_token_is_an_island():
    """The same bits at another place, among other tokens, among NaN, and beside padding."""
    x, live = tokens(1), np.ones(TOKENS, bool)
    whole = np.asarray(computed(layer(), x, live))
    for seed in range(2, 6):
        rng = np.random.default_rng(seed)
        place = rng.permutation(TOKENS)[:3]
        others = tokens(seed)
        others[rng.integers(TOKENS)] = np.nan
        others[place] = x[:3]
        live = rng.random(TOKENS) < 0.5
        live[place] = True
        np.testing.assert_array_equal(computed(layer(), others, live)[place], whole[:3])
    expected = [alone(layer(), row) for row in x]
    np.testing.assert_allclose(whole, expected, rtol=1e-4, atol=1e-4)


def alone(layer: dict[str, jax.Array], x: np.ndarray) -> np.ndarray:
    """What the experts return to a token, in plain numpy."""
    logits = x @ np.asarray(layer["router"])
    shares = np.exp(logits - logits.max())
    chosen = np.argsort(-shares)[: SPEC.experts_per_token]
    total = np.zeros_like(x)
    for expert in chosen:
        gate, up = np.einsum("d,dux->ux", x, np.asarray(layer["w_experts_up"][expert]))
        hidden = gate / (1 + np.exp(-gate)) * up
        share = shares[expert] / shares[chosen].sum()
        total += share * (hidden @ np.asarray(layer["w_experts_down"][expert]))
    return total


def test_of_equal_experts_the_first_ones_are_chosen():
    among_all = replace(SPEC, normalised=False)

    @jax.jit
    def routed(x: jax.Array) -> Any:
        return [route(x, jnp.ones(TOKENS), jnp.zeros((16, 4)), s) for s in (SPEC, among_all)]

    for (chosen, shares), share in zip(routed(tokens(1)), (0.5, 0.25), strict=True):
        np.testing.assert_array_equal(chosen, [[0, 1]] * TOKENS)
        np.testing.assert_array_equal(shares, [[share, share]] * TOKENS)


def test_padding_goes_through_no_expert(monkeypatch: pytest.MonkeyPatch):
    seen: list[jax.Array] = []

    def noted(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        seen.append(sizes)
        return jnp.zeros((len(x), w.shape[2]))

    @jax.jit
    def sizes(layer: Any, x: jax.Array, live: jax.Array) -> Any:
        scale = jnp.ones(TOKENS)
        chosen, shares = route(x, scale, layer["router"], SPEC)
        through_experts(layer, x, scale, chosen, shares, SPEC, live)
        return chosen, seen

    monkeypatch.setattr(experts, "grouped_product", noted)
    chosen, (up, down) = sizes(layer(), tokens(1), np.arange(TOKENS) < 3)
    np.testing.assert_array_equal(up, np.bincount(np.ravel(chosen[:3]), minlength=4))
    np.testing.assert_array_equal(up, down)


def test_counts_are_of_the_experts_that_tokens_go_through():
    attention = 2 * 16 * 4 * (2 * 4 + 2 * 2)
    expert, router = 2 * 3 * 16 * 6, 2 * 16 * 4
    assert matrix_params(SPEC) == attention + router + 2 * expert
    assert touched_params(SPEC, 1) == matrix_params(SPEC)
    assert touched_params(SPEC, 2) == attention + router + 3 * expert
    assert touched_params(SPEC, 100) == attention + router + 4 * expert
    dense = replace(SPEC, dense_layers=(0,))
    assert matrix_params(dense) == attention + 3 * 16 * 24 + router // 2 + expert
    assert SPEC.mlp_params == router + 4 * expert


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_per_token": 5}, "experts_per_token=5: must be at least 1 and at most 4"),
        ({"num_experts": 0}, "num_experts=0: must be at least 1"),
        ({"dense_layers": (0, 1)}, r"dense_layers=\(0, 1\): some layer must have experts"),
        ({"dense_layers": (2,)}, "dense_layers=2: must be at least 0 and at most 1"),
        ({"normalised": 1}, "normalised=1: must be true or false"),
    ],
)
def test_numbers_that_cannot_be(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        replace(SPEC, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefill.tp": 2, "prefill.experts": "whole"}, r"prefill\.tp=2: .* num_experts=5"),
        ({"decode.tp": 2}, r"decode\.tp=2: .* expert_mlp_dim=7; allowed: \[1, 7\]"),
        ({"decode.experts": "all"}, r"decode\.experts='all'.* split, whole"),
        ({"colocated": True, "prefill.experts": "whole"}, "equal tp and experts, but has"),
    ],
)
def test_shards_that_cannot_be(changes: dict[str, Any], message: str):
    spec = replace(SPEC, num_experts=5, expert_mlp_dim=7)
    config = Config(ModelConfig("random", spec=spec))
    with pytest.raises(ValueError, match=message):
        LLM(config, changes)


def test_whole_experts_of_a_dense_model_are_refused():
    with pytest.raises(
        ValueError, match=r"decode\.experts='whole': the family llama has no experts"
    ):
        LLM(MONOLITHIC, {"colocated": False, "decode.experts": "whole"})
