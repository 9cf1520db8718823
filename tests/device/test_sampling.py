"""Sampling against plain numpy, and the promise that a token depends on (seed, position) alone."""

from dataclasses import fields, replace
from typing import Any

import jax
import numpy as np
import pytest

from pdjax.device.models.sampling import VARIANTS, Asked, Choice, Wanted, all_asked, choose
from pdjax.device.steps.sample import Undecided, make_sample_step
from pdjax.interfaces.batches import NO_TOKEN, NOT_FINITE, Masks, SamplingBatch

V = 97
choose_asked = jax.jit(choose, static_argnames="max_logprobs")


def choose_jit(
    logits, positions, params: SamplingBatch, history, *, max_logprobs: int, masks=None
) -> Choice:
    asked = Asked.of(params, np.shape(logits)[1], len(logits), masks)
    return choose_asked(logits, positions, asked, history, max_logprobs=max_logprobs)


def sampling(rows: int, **fields) -> SamplingBatch:
    base = {
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": 0,
        "prompt_lens": 0,
        "logprobs": False,
    }
    kinds = {"top_k": np.int32, "seed": np.uint32, "prompt_lens": np.int32, "logprobs": bool}
    arrays = {}
    for name, value in (base | fields).items():
        arrays[name] = np.broadcast_to(
            np.asarray(value, kinds.get(name, np.float32)), (rows,)
        ).copy()
    return SamplingBatch(**arrays)


def draw_many(logits: np.ndarray, draws: int, **fields) -> np.ndarray:
    """Tokens drawn from one distribution at `draws` positions."""
    rows = np.repeat(logits[None], draws, axis=0)
    return np.asarray(
        choose_jit(rows, np.arange(draws), sampling(draws, **fields), None, max_logprobs=1).tokens
    )


def kept_by_filters(
    logits: np.ndarray, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0
) -> set[int]:
    """The tokens that may be drawn, by sorting."""
    scaled = logits.astype(np.float64) / temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = np.argsort(-probs)
    kept = list(order[: top_k or V])
    mass = probs[kept].sum()
    if top_p < 1:
        reach = np.cumsum(probs[kept]) / mass
        kept = kept[: int(np.searchsorted(reach, top_p)) + 1]
    return {int(token) for token in kept if probs[token] >= min_p * probs.max()}


@pytest.mark.smoke
def test_greedy_takes_the_largest_logit():
    logits = np.random.default_rng(0).normal(size=(5, V)).astype(np.float32)
    out = choose_jit(logits, np.arange(5), sampling(5), None, max_logprobs=1)
    np.testing.assert_array_equal(out.tokens, logits.argmax(1))


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_p": 0.5},
        {"top_p": 0.9, "temperature": 0.7},
        {"min_p": 0.1},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.02, "temperature": 1.3},
    ],
)
def test_filters_keep_exactly_the_tokens_that_sorting_keeps(fields):
    logits = 2 * np.random.default_rng(1).normal(size=V).astype(np.float32)
    allowed = kept_by_filters(logits, **fields)
    drawn = set(draw_many(logits, 2000, **({"temperature": 1.0} | fields)).tolist())
    assert drawn <= allowed
    likely = {t for t in allowed if np.exp(logits[t] - logits.max()) > 0.05}
    assert likely <= drawn


def test_frequencies_follow_the_softmax():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    counts = np.bincount(draw_many(logits, 20000, temperature=1.0), minlength=4) / 20000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.015)


def test_a_token_depends_on_seed_and_position_alone():
    logits = np.random.default_rng(2).normal(size=V).astype(np.float32)
    alone = choose_jit(
        logits[None], np.array([41]), sampling(1, temperature=1.0, seed=9), None, max_logprobs=1
    )
    others = np.random.default_rng(3).normal(size=(6, V)).astype(np.float32)
    others[4] = logits
    seeds, positions = np.array([1, 2, 3, 4, 9, 6]), np.array([3, 1, 4, 1, 41, 9])
    crowd = choose_jit(
        others, positions, sampling(6, temperature=1.0, seed=seeds), None, max_logprobs=1
    )
    assert crowd.tokens[4] == alone.tokens[0]
    assert len(set(draw_many(logits, 50, temperature=1.0, seed=9).tolist())) > 5


@pytest.mark.parametrize("temperature", [1e-6, 1e-37, 1e-38])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5, "top_p": 0.9, "min_p": 0.1}])
def test_a_tiny_temperature_is_greedy(temperature, filters):
    logits = 40 * np.random.default_rng(7).normal(size=(5, V)).astype(np.float32)
    params = sampling(5, temperature=temperature, seed=3, **filters)
    out = choose_jit(logits, np.arange(5), params, None, max_logprobs=1)
    np.testing.assert_array_equal(out.tokens, logits.argmax(1))


@pytest.mark.parametrize(
    "fields",
    [
        *({"top_p": p} for p in (1e-9, 1e-37, 1.18e-38, 1e-38, 1e-45, 1e-60)),
        *({"top_p": p, "top_k": k} for p in (1e-37, 1e-300) for k in (1, 2, 5)),
        {"top_p": 1e-37, "min_p": 1e-37},
        {"top_p": 1e-37, "temperature": 1e-38},
        {"top_p": 1e-37, "temperature": 1e38, "top_k": 1},
        {"min_p": 0.9999999, "temperature": 0.1},
        {"top_p": 1e-38, "repetition_penalty": 0.5},
    ],
)
def test_the_likeliest_token_stays_however_small_the_filter(fields):
    """Also where the probability that is asked for is no number of float32, or no normal one."""
    logits = np.random.default_rng(9).normal(size=(200, V)).astype(np.float32)
    history = np.zeros((200, 4), np.int32)
    params = sampling(200, **({"temperature": 1.0} | fields))
    out = choose_jit(logits, np.zeros(200, np.int32), params, history, max_logprobs=1)
    np.testing.assert_array_equal(out.tokens, logits.argmax(1))


@pytest.mark.parametrize("top_p", [1e-38, 0.5, 0.999])
def test_what_is_equally_likely_stays_together(top_p):
    drawn = draw_many(np.zeros(V, np.float32), 3000, temperature=1.0, top_p=top_p)
    assert set(drawn.tolist()) == set(range(V))


@pytest.mark.parametrize("repetition", [1e-300, 1e-40, 1e-38, 100.0])
def test_no_penalty_makes_a_logit_infinite(repetition):
    """The two tokens whose logits overflow are equal, and the first of equals is taken."""
    logits = np.array([[1.0, -3e38, 2.0, 3e38, 0.0]], np.float32)
    history, fields = np.array([[2, 0, 4, 1]], np.int32), {"repetition_penalty": repetition}
    out = choose_jit(logits, np.array([4]), sampling(1, **fields), history, max_logprobs=1)
    assert out.tokens[0] in (0, 2, 3)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_row_whose_logits_are_not_finite_gets_no_token(variant):
    """One bad logit is enough, wherever it is and however unlikely; other rows keep their bits."""
    logits = 3 * np.random.default_rng(10).normal(size=(12, V)).astype(np.float32)
    params = sampling(12, temperature=[0.0, 1.0] * 6 if variant.draw else 0.0, seed=3)
    history = np.random.default_rng(11).integers(0, V, size=(12, 8)).astype(np.int32)

    def chosen(logits: np.ndarray) -> np.ndarray:
        positions, asked = np.full(12, 7), Asked.of(params, V, 12, variant=variant)
        return np.asarray(choose_asked(logits, positions, asked, history, max_logprobs=1).tokens)

    spoiled = logits.copy()
    bad = [np.nan, np.inf, -np.inf, -np.nan]
    for row, value in zip(range(0, 8, 2), bad, strict=True):
        spoiled[row, [0, V - 1, 50, 3][row // 2]] = value
    spoiled[8], spoiled[10] = np.nan, -np.inf
    out = chosen(spoiled)
    assert (out[::2] == NOT_FINITE).all()
    np.testing.assert_array_equal(out[1::2], chosen(logits)[1::2])
    huge = logits.copy()
    huge[:, 5] = 3.4e38  # large, but a number
    np.testing.assert_array_equal(chosen(huge), 5)


def test_a_row_without_a_token_feeds_an_id_back():
    """On the device a sentinel would name no embedding, and no row of the history."""
    mesh = jax.make_mesh((1, 1), ("stage", "tp"), devices=jax.devices()[:1])
    logits = np.full((2, V), np.nan, np.float32)
    logits[1] = np.arange(V)
    undecided = Undecided(logits, np.array([3, 4], np.int32), np.arange(2))
    history = np.full((2, 8), 9, np.int32)
    step = make_sample_step(mesh, 1)
    fed_back, history, choice = step(
        undecided, np.zeros(2, np.int32), history, Asked.of(sampling(2), V, 2)
    )
    assert choice.tokens.tolist() == [NOT_FINITE, V - 1]
    assert fed_back.tolist() == [0, V - 1]
    assert (history[0, 3], history[1, 4]) == (0, V - 1)


def test_greedy_and_sampled_rows_share_a_batch():
    logits = np.random.default_rng(4).normal(size=(4, V)).astype(np.float32)
    mixed = sampling(4, temperature=[0.0, 1.0, 0.0, 1.0], top_k=[0, 3, 0, 0], seed=[0, 5, 0, 6])
    out = np.asarray(choose_jit(logits, np.arange(4), mixed, None, max_logprobs=1).tokens)
    assert out[0] == logits[0].argmax() and out[2] == logits[2].argmax()
    assert out[1] in kept_by_filters(logits[1], top_k=3)


def test_penalties_follow_their_formulas():
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(3, V)).astype(np.float32)
    history = rng.integers(0, 12, size=(3, 32)).astype(np.int32)
    prompt, length = np.array([4, 10, 0]), np.array([20, 25, 3])
    presence, frequency, repetition = [0.7, 0.0, 2.0], [0.3, 1.5, 0.0], [1.0, 1.8, 0.5]
    expected = logits.copy()
    for b in range(3):
        ids = history[b, : length[b]]
        for t in set(ids.tolist()):
            expected[b, t] *= 1 / repetition[b] if expected[b, t] > 0 else repetition[b]
        for t in history[b, prompt[b] : length[b]]:
            expected[b, t] -= frequency[b]
        for t in set(history[b, prompt[b] : length[b]].tolist()):
            expected[b, t] -= presence[b]
    params = sampling(
        3,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        prompt_lens=prompt,
    )
    out = choose_jit(logits, length, params, history, max_logprobs=1)
    np.testing.assert_array_equal(out.tokens, expected.argmax(1))


def test_logprobs_are_of_the_models_own_distribution():
    logits = 3 * np.random.default_rng(6).normal(size=(2, V)).astype(np.float32)
    params = sampling(2, temperature=[0.0, 5.0], top_k=[0, 2], seed=1, logprobs=[True, False])
    out = choose_jit(logits, np.array([3, 4]), params, None, max_logprobs=5)
    assert out.logprobs is not None
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(
        out.logprobs.chosen, expected[[0, 1], np.asarray(out.tokens)], rtol=1e-5
    )
    order = np.argsort(-logits, axis=1)[:, :5]
    np.testing.assert_array_equal(out.logprobs.top_ids, order)
    np.testing.assert_allclose(out.logprobs.top, np.take_along_axis(expected, order, 1), rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "variant"),
    [
        ({}, 0),
        ({"top_k": 3, "top_p": 0.5, "seed": 4}, 0),  # greedy rows are not filtered
        ({"temperature": [0.0, 0.1]}, 1),
        ({"temperature": [0.0, 0.1], "min_p": [0.0, 0.1]}, 3),
        ({"logprobs": [False, True]}, 3),
        ({"presence_penalty": [0.0, -0.1]}, 4),
        ({"frequency_penalty": [0.1, 0.0]}, 4),
        ({"repetition_penalty": [1.0, 0.9]}, 4),
    ],
)
def test_the_cheapest_variant_that_can_serves_a_batch(fields, variant):
    assert Asked.of(sampling(2, **fields), V, 2).variant == VARIANTS[variant]
    masked = Asked.of(sampling(2, **fields), V, 2, masks({1: [5]})).variant
    assert masked == VARIANTS[2 if variant <= 2 else 5]


def test_the_last_variant_can_do_everything():
    assert VARIANTS[-1] == Wanted(**{each.name: True for each in fields(Wanted)})


def test_every_variant_chooses_the_same():
    """What neighbours ask for decides which program a row goes through, and may not change it."""
    rng, vocab = np.random.default_rng(8), 4099
    logits = 3 * rng.normal(size=(64, vocab)).astype(np.float32)
    history = rng.integers(0, vocab, size=(64, 32)).astype(np.int32)
    positions = rng.integers(1, 32, size=64)
    greedy = sampling(64)
    warm = sampling(64, temperature=rng.uniform(0.3, 2, 64), seed=rng.integers(99, size=64))
    filtered = sampling(
        64,
        temperature=rng.uniform(0.3, 2, 64),
        seed=rng.integers(99, size=64),
        top_k=rng.integers(0, 50, 64),
        top_p=rng.uniform(0.3, 1, 64),
        min_p=rng.uniform(0, 0.1, 64),
    )
    for least, params in ((0, greedy), (1, warm), (3, filtered)):
        outs = [
            choose_asked(
                *(logits, positions, Asked.of(params, vocab, 64, variant=variant), history),
                max_logprobs=5,
            )
            for variant in VARIANTS
            if variant.covers(VARIANTS[least])
        ]
        for out in outs:
            np.testing.assert_array_equal(out.tokens, outs[0].tokens)
        first, *others = [jax.tree.leaves(out.logprobs) for out in outs if out.logprobs is not None]
        for other in others:
            jax.tree.map(np.testing.assert_array_equal, other, first)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_no_variant_branches_on_the_device(variant):
    """The host would have to wait for the predicate of a branch."""
    asked = Asked.of(sampling(2), V, 2, variant=variant)
    history = np.zeros((2, 8), np.int32)
    logits = np.zeros((2, V), np.float32)
    lowered = choose_asked.lower(logits, np.arange(2), asked, history, max_logprobs=1)
    assert not {"stablehlo.case", "stablehlo.if"} & set(lowered.as_text().replace('"', " ").split())


def masks(allowed: dict[int, list[int]], vocab: int = V) -> Masks:
    """Masks of rows that may choose these tokens."""
    bits = np.zeros((len(allowed), -(-vocab // 32) * 32), bool)
    for place, tokens in enumerate(allowed.values()):
        bits[place, tokens] = True
    packed = np.packbits(bits, axis=1, bitorder="little").view(np.uint32)
    return Masks(np.array(list(allowed), np.int32), packed)


def biased(rows: int, biases: dict[int, dict[int, float]], **fields) -> SamplingBatch:
    """Rows of which some have a bias on tokens."""
    tokens, values = np.full((rows, 1024), NO_TOKEN, np.int32), np.zeros((rows, 1024), np.float32)
    for row, theirs in biases.items():
        tokens[row, : len(theirs)], values[row, : len(theirs)] = [*theirs], [*theirs.values()]
    return replace(sampling(rows, **fields), bias_tokens=tokens, bias=values)


@pytest.mark.parametrize("rows", [4, 20])  # a mask a row, and fewer
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_masked_row_chooses_among_its_tokens_and_others_keep_theirs(rows, temperature):
    logits = 3 * np.random.default_rng(12).normal(size=(rows, V)).astype(np.float32)
    positions, history = np.full(rows, 7), np.zeros((rows, 8), np.int32)
    params = sampling(rows, temperature=temperature, seed=range(rows), logprobs=True)
    allowed = {1: [V - 1], 3: [0, 31, 32, 64, V - 1]}
    plain = choose_jit(logits, positions, params, history, max_logprobs=3)
    out = choose_jit(logits, positions, params, history, max_logprobs=3, masks=masks(allowed))
    others = [row for row in range(rows) if row not in allowed]
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(out), strict=True):
        np.testing.assert_array_equal(np.asarray(one)[others], np.asarray(other)[others])
    assert out.tokens[1] == V - 1 and int(out.tokens[3]) in allowed[3]
    if temperature == 0:
        assert out.tokens[3] == max(allowed[3], key=lambda token: logits[3, token])
    # The report is of the model's own distribution.
    assert out.logprobs is not None and plain.logprobs is not None
    np.testing.assert_array_equal(out.logprobs.top, plain.logprobs.top)
    own = logits[1] - np.log(np.exp(logits[1]).sum())
    np.testing.assert_allclose(out.logprobs.chosen[1], own[V - 1], rtol=1e-5)


@pytest.mark.parametrize("rows", [4, 8, 9, 64, 100])
def test_masks_of_any_number_of_rows_have_an_upload_that_was_rehearsed(rows: int):
    def kind(asked: Asked) -> tuple[Any, int]:
        return asked.variant, 0 if asked.masks is None else len(asked.masks.rows)

    rehearsed = [kind(asked) for asked in all_asked(sampling(rows), V, rows)]
    assert len(set(rehearsed)) == len(rehearsed)
    for count in range(1, rows + 1):
        asked = Asked.of(sampling(rows), V, rows, masks({row: [5] for row in range(count)}))
        assert kind(asked) in rehearsed
        assert kind(asked)[1] == next(size for size in (8, 64, rows) if count <= size <= rows)


def test_what_is_drawn_under_a_mask_follows_the_softmax_of_what_is_allowed():
    logits, draws = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32)), 1500
    everywhere = masks({row: [1, 3] for row in range(draws)}, 4)
    out = choose_jit(
        np.repeat(logits[None], draws, axis=0),
        np.arange(draws),
        sampling(draws, temperature=1.0, top_p=0.95),
        np.zeros((draws, 1), np.int32),
        max_logprobs=1,
        masks=everywhere,
    )
    counts = np.bincount(out.tokens, minlength=4) / draws
    np.testing.assert_allclose(counts, [0, 0.3 / 0.35, 0, 0.05 / 0.35], atol=0.04)


def test_biases_are_added_after_penalties():
    logits = np.random.default_rng(13).normal(size=(4, V)).astype(np.float32)
    history = np.full((4, 8), 5, np.int32)
    biases = {0: {9: 100.0}, 2: {V - 1: 5.0, 5: -100.0}, 3: {5: 100.0}}
    params = biased(4, biases, repetition_penalty=[1.0, 1.0, 1.0, 100.0])
    out = choose_jit(logits, np.full(4, 7), params, history, max_logprobs=1)
    assert out.tokens.tolist() == [9, logits[1].argmax(), V - 1, 5]


def test_a_mask_does_not_hide_that_logits_are_not_finite():
    logits = np.zeros((2, V), np.float32)
    logits[0, 3] = np.nan
    history = np.zeros((2, 8), np.int32)
    both = masks({0: [5], 1: [5]})
    out = choose_jit(logits, np.full(2, 7), sampling(2), history, max_logprobs=1, masks=both)
    assert out.tokens.tolist() == [NOT_FINITE, 5]
