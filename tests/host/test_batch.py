import numpy as np
import pytest

from pdjax.config import DecodeConfig, PrefillConfig
from pdjax.core.kv_layout import KVLayout
from pdjax.core.request import Request, SamplingParams
from pdjax.host.batching.buckets import Buckets, fit
from pdjax.host.batching.chunks import Chunk
from pdjax.host.batching.prefill_batch import empty_prefill_batch, history, prefill_batch
from pdjax.host.batching.sampling_rows import SamplingRows
from pdjax.host.handoff.spans import Spans
from pdjax.host.sequences.prompt_scores import PromptScores
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.batches import Scores

PREFILL = PrefillConfig(token_budget=8, max_sequences=3)
BUCKETS = Buckets.of(PREFILL, DecodeConfig(page_buckets=(2, 8)), page_size=4, max_model_len=32)


def sequence(prompt, pages, output=(), **params) -> Sequence:
    request = Request("r", tuple(prompt), SamplingParams(**params), 0.0)
    made = Sequence(request, 0, seed=7, pages=list(pages), output=list(output))
    made.max_new_tokens = 5
    return made


def test_default_buckets_are_few_and_hold_everything():
    buckets = Buckets.of(PrefillConfig(), DecodeConfig(), page_size=16, max_model_len=1024)
    assert buckets.tokens == (32, 128, 512)
    assert buckets.step_pages == (64,)
    assert buckets.table_pages == (16, 64)
    assert (buckets.token_budget, buckets.sequences, buckets.context) == (512, 8, 1024)
    assert spans((16, 16), 1024).buckets == (4, 16, 64)
    long = Buckets.of(PrefillConfig(), DecodeConfig(), page_size=64, max_model_len=2**19)
    assert long.step_pages == (512, 8192)
    assert long.table_pages == (8, 32, 128, 512, 2048, 8192)


def test_spans_of_many_bytes_are_padded_to_less_than_twice():
    llama_8b = KVLayout.of_heads(32, 8, 128, 64, "bfloat16", 2)
    assert Spans.between(llama_8b, llama_8b, 8192).buckets == (4, 8, 16, 32, 64, 128)
    small = KVLayout.of_heads(30, 3, 64, 16, "float32", 4)
    assert Spans.between(small, small, 1024).buckets == (4, 16, 64)


def spans(sizes: tuple[int, int], max_model_len: int = 32) -> Spans:
    source, target = (KVLayout.of_heads(2, 1, 1, size, "float32", 4) for size in sizes)
    return Spans.between(source, target, max_model_len)


def test_an_engine_has_buckets_of_the_steps_that_it_accepts():
    prefill = Buckets.of(PREFILL, None, page_size=4, max_model_len=32)
    assert (prefill.tokens, prefill.step_pages) == (BUCKETS.tokens, BUCKETS.step_pages)
    assert list(prefill.prefill_shapes()) == list(BUCKETS.prefill_shapes())
    assert prefill.table_pages == ()
    decode = Buckets.of(None, DecodeConfig(page_buckets=(2, 8)), page_size=4, max_model_len=32)
    assert (decode.tokens, decode.step_pages, decode.table_pages) == ((), (), (2, 8))
    assert list(decode.prefill_shapes()) == []


def test_a_full_budget_of_short_prompts_fits_a_step():
    config = PrefillConfig(token_budget=100, max_sequences=50)
    buckets = Buckets.of(config, DecodeConfig(), page_size=16, max_model_len=32)
    assert buckets.step_pages[-1] >= 50  # two tokens each, a page each


def test_shapes_that_no_plan_can_have_are_left_out():
    buckets = Buckets.of(
        PrefillConfig(token_budget=64, token_buckets=(8, 64), page_buckets=(1, 4, 16)),
        DecodeConfig(),
        page_size=8,
        max_model_len=128,
    )
    # More than 8 tokens need more than one page of 8.
    assert list(buckets.prefill_shapes()) == [(8, 1), (8, 4), (8, 16), (64, 4), (64, 16)]


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_buckets_too_small_for_the_context_are_refused(side):
    prefill = PrefillConfig(page_buckets=(4,) if side == "prefill" else None)
    decode = DecodeConfig(page_buckets=(4,) if side == "decode" else None)
    with pytest.raises(ValueError, match=rf"{side}.page_buckets=\(4,\).*8 pages.*128"):
        Buckets.of(prefill, decode, page_size=16, max_model_len=128)


def test_fit():
    assert [fit((2, 8), size) for size in (0, 1, 2, 3, 8)] == [2, 2, 2, 8, 8]
    with pytest.raises(AssertionError, match="too large"):
        fit((2, 8), 9)


def test_chunks_are_packed_and_padded():
    whole = sequence([10, 11, 12], pages=[5])
    later = sequence([20, 21, 22, 23, 24, 25], pages=[3, 9])
    batch = prefill_batch([Chunk(whole, 0, 3), Chunk(later, 4, 6)], BUCKETS)
    assert batch.tokens.tolist() == [10, 11, 12, 24, 25, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 4, 5, 0, 0, 0]
    assert batch.slot_mapping.tolist() == [20, 21, 22, 36, 37, 0, 0, 0]
    assert batch.kv_pages.tolist()[:3] == [5, 3, 9]
    assert not batch.kv_pages[3:].any()
    assert batch.cu_pages.tolist() == [0, 1, 3, 3]
    assert batch.cu_q_lens.tolist() == [0, 3, 5, 5]
    assert batch.kv_lens.tolist() == [3, 6, 0]
    assert batch.sample_at.tolist() == [2, 4, 0]
    assert batch.history is None
    for array in (batch.tokens, batch.slot_mapping, batch.kv_pages, batch.cu_q_lens):
        assert array.dtype == np.int32


def test_only_the_last_chunk_is_sampled():
    first = sequence([1] * 9, pages=[1, 2, 3], temperature=0.7, logprobs=2)
    last = sequence([1, 2], pages=[4], temperature=0.9, top_p=0.5)
    sampling = prefill_batch([Chunk(first, 0, 6), Chunk(last, 0, 2)], BUCKETS).sampling
    assert sampling.temperature.tolist() == pytest.approx([0, 0.9, 0])
    assert sampling.top_p.tolist() == [1, 0.5, 1]
    assert sampling.seed.tolist() == [0, 7, 0]
    assert sampling.prompt_lens.tolist() == [0, 2, 0]
    assert not sampling.logprobs.any()


def test_log_probabilities_of_prompts_are_asked_by_the_tokens_before():
    asks = sequence([11, 12, 13, 14, 15, 16], pages=[1, 2], output=[17])
    asks.prompt_scores = PromptScores(6, 0)
    other = sequence([1, 2], pages=[4])
    chunks = Chunk(other, 0, 2), Chunk(asks, 0, 4)
    scored = prefill_batch(chunks, BUCKETS).scored
    assert scored is not None
    assert scored.at.tolist() == [2, 3, 4, 5]
    assert scored.targets.tolist() == [12, 13, 14, 15]
    asks.prompt_scores.add(Scores(*np.zeros((2, 4)), *np.zeros((2, 4, 0))))
    assert asks.reusable == 4, "the fifth token's logits tell of the sixth"
    scored = prefill_batch([Chunk(asks, 2, 7)], BUCKETS).scored
    assert scored is not None
    assert (scored.at.tolist(), scored.targets.tolist()) == ([2], [16])
    asks.prompt_scores.add(Scores(*np.zeros((2, 1)), *np.zeros((2, 1, 0))))
    assert prefill_batch([Chunk(asks, 0, 7)], BUCKETS).scored is None
    assert asks.prompt_scores.complete and asks.reusable == 6


def test_legal_values_that_no_array_can_hold_are_cut():
    rows = SamplingRows(1)
    rows.fill(0, sequence([1], pages=[], temperature=1e300, top_k=2**40, top_p=1e-300))
    sampling = rows.take()
    assert np.isfinite(sampling.temperature[0])
    assert sampling.top_k[0] == 2**31 - 1
    assert sampling.top_p[0] > 0


def test_history_travels_only_for_penalties():
    resumed = sequence([1, 2], pages=[4], output=[3], repetition_penalty=1.3)
    chunk = Chunk(resumed, 0, 3)
    batch = prefill_batch([chunk], BUCKETS)
    assert batch.history is not None
    assert batch.history.shape == (3, 32)
    assert batch.history[0, :4].tolist() == [1, 2, 3, 0]
    assert batch.sampling.prompt_lens[0] == 2
    unfinished = prefill_batch([Chunk(resumed, 0, 1)], BUCKETS)
    assert unfinished.history is None


def test_padded_lists():
    held = [([7, 8, 9, 4, 5], range(1, 4)), ([3], range(1))]
    assert spans((4, 4)).pages(held, 4).tolist() == [8, 9, 4, 3]
    remembered = history([5, 6], BUCKETS)
    assert remembered.shape == (32,)
    assert remembered[:3].tolist() == [5, 6, 0]


def test_an_empty_batch_touches_the_null_page_alone():
    batch = empty_prefill_batch(BUCKETS, 8, 2)
    assert not batch.slot_mapping.any()
    assert not batch.kv_pages.any()
    assert not batch.cu_q_lens.any()
    assert (batch.sampling.top_p == 1).all()


@pytest.mark.parametrize(
    ("sizes", "source", "target"),
    [
        ((4, 8), [7, 8, 9, 0, 0, 0, 0, 0], [1, 2, 0, 0]),  # four spans of 8 tokens, two unused
        ((8, 4), [7, 8, 0, 0], [1, 2, 3, 0, 0, 0, 0, 0]),
    ],
)
def test_spans_of_pools_with_other_pages(sizes, source, target):
    between = spans(sizes)
    assert (between.tokens, between.buckets) == (8, (4,))
    for size, expected in zip(sizes, (source, target), strict=True):
        pages = [page for page in expected if page]
        assert between.pages([(pages, range(2))], size).tolist() == expected
