"""`experiments.check_steps` finds wrong steps."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from experiments.check_steps import __main__ as check_steps
from experiments.check_steps.__main__ import Errors, Limits
from experiments.check_steps.batches import (
    Batches,
    decode_batches,
    mixed_batches,
    parse,
    parse_mixed,
    prefill_batches,
)
from experiments.check_steps.steps import (
    REFERENCE,
    Outcome,
    Steps,
    implementations,
    upcast,
    weights,
)
from experiments.common.shapes import MODELS
from pallas_kernels.prefill_attention import api
from pdjax.core.kv_layout import NULL_PAGE
from pdjax.device.models.decoder import Params
from pdjax.interfaces.batches import IDLE_ROW, DecodeBatch, PrefillBatch
from pdjax.interfaces.steps import MixedStep

PAGE = 8
SPEC = replace(MODELS["tiny"], num_layers=1)
LIMITS = Limits(bound=16 * 2**-9 * 2**0.5, ratio=2.0)
BUCKETS = {
    "prefill": prefill_batches(24, 10, PAGE, SPEC.vocab_size),
    "decode": decode_batches(4, 3, PAGE, SPEC.vocab_size),
    "mixed": mixed_batches((4, 3), (24, 10), PAGE, SPEC.vocab_size),
}


def test_a_prefill_bucket_holds_some_of_everything():
    *before, last = BUCKETS["prefill"].steps
    assert isinstance(last, PrefillBatch)
    assert len(before) == 2
    assert np.diff(last.cu_q_lens).tolist() == [8, 6, 1, 4, 0]
    assert last.kv_lens.tolist() == [8, 53, 1, 4, 0]  # earlier tokens end within a page
    assert np.diff(last.cu_pages).tolist() == [1, 7, 1, 1, 0]
    with pytest.raises(ValueError, match=r"prefill=24x4: must be at least 16 tokens, and pages"):
        prefill_batches(24, 4, PAGE, SPEC.vocab_size)


def test_a_decode_bucket_goes_from_long_to_short_and_an_idle_row():
    ticks = BUCKETS["decode"].steps
    positions = [tick.positions[0].tolist() for tick in ticks if isinstance(tick, DecodeBatch)]
    assert positions[0] == [21, 7, 1, IDLE_ROW]
    assert positions[-1] == [23, 9, 3, IDLE_ROW]
    with pytest.raises(ValueError, match="decode=4x1: a table must hold"):
        decode_batches(4, 1, PAGE, SPEC.vocab_size)


def test_a_mixed_bucket_has_pages_of_its_own_for_chunks_and_for_rows():
    bucket = BUCKETS["mixed"]
    assert [type(step) for step in bucket.steps] == [MixedStep] * 3
    ticks = [step.rows.page_table for step in bucket.steps if isinstance(step, MixedStep)]
    last = bucket.steps[-1]
    assert isinstance(last, MixedStep)
    written, listed = last.chunks.slot_mapping // PAGE, last.chunks.kv_pages
    assert not set(np.unique(ticks)) & (set(listed) - {NULL_PAGE})
    assert (written == NULL_PAGE).sum() == len(written) - last.chunks.cu_q_lens[-1]  # padding
    assert max(listed) < bucket.pages and np.isin(written, [NULL_PAGE, *listed]).all()


def test_a_mixed_bucket_is_one_of_decode_and_one_of_prefill():
    assert parse_mixed("8x16/64x8") == ((8, 16), (64, 8))
    for text in ("8x16", "8x16/64"):
        with pytest.raises(ValueError, match="must be "):
            parse_mixed(text)


@pytest.mark.parametrize("text", ["", "8", "0x8", "8x16x2"])
def test_a_bucket_is_two_sizes(text: str):
    with pytest.raises(ValueError, match="must be two sizes"):
        parse(text)


@cache
def half() -> Params:
    return weights(SPEC)


@cache
def float32() -> Params:
    return upcast(half())


@cache
def float32_steps(phase: str) -> tuple[Steps, Outcome]:
    steps = Steps(SPEC, float32(), PAGE, REFERENCE, BUCKETS[phase])
    steps.compile()
    return steps, steps.run(BUCKETS[phase])


def shuffled(batches: Batches) -> Batches:
    """Permute the pages that are read; tokens are written to the right pages."""

    def step(batch: PrefillBatch | DecodeBatch | MixedStep) -> Any:
        if isinstance(batch, MixedStep):
            return MixedStep(step(batch.chunks), step(batch.rows))
        if isinstance(batch, DecodeBatch):
            return replace(batch, page_table=np.roll(batch.page_table, 1, axis=1))
        return replace(batch, kv_pages=batch.kv_pages[::-1].copy())

    return replace(batches, steps=tuple(map(step, batches.steps)))


@pytest.mark.parametrize("phase", list(BUCKETS))
def test_wrong_pages_are_caught(phase: str):
    steps, exact = float32_steps(phase)
    right = Errors.of(exact, exact)
    assert LIMITS.broken(right, right) == []
    wrong = Errors.of(steps.run(shuffled(BUCKETS[phase])), exact)
    assert 0.5 < wrong.relative.max() < 2
    assert any("error of logits" in line for line in LIMITS.broken(wrong, right))
    assert any("error of logits" in line for line in LIMITS.broken(right, wrong))


def test_wrong_rotation_is_caught():
    _, exact = float32_steps("prefill")
    spec = replace(SPEC, rope=replace(SPEC.rope, theta=100.0))
    steps = Steps(spec, float32(), PAGE, REFERENCE, BUCKETS["prefill"])
    steps.compile()
    wrong = Errors.of(steps.run(BUCKETS["prefill"]), exact)
    assert wrong.relative.max() > 0.3
    assert wrong.kv > 0.3
    assert LIMITS.broken(wrong, wrong) != []


def test_bfloat16_is_within_its_bound():
    buckets = [BUCKETS["decode"], BUCKETS["mixed"]]
    results = check_steps.check(SPEC, half(), buckets, PAGE, None, LIMITS)
    names = ["decode 4x3", "mixed 4x3/24x10"]
    assert [(row["bucket"], row["wrong"]) for row in results] == [(name, []) for name in names]
    row = results[0]
    assert 2**-9 < row["reference"]["relative"] < LIMITS.bound
    assert row["kernels"] == row["reference"]  # on the CPU the references run
    assert row["kernels_in_program"] == []
    assert check_steps.show(results).splitlines()[-1].split()[-1] == "ok"


def errors(relative: float, behind: float = 0.0) -> Errors:
    rows = np.full(3, relative)
    return Errors(rows, 4 * rows, np.array([0.0, behind, 0.0]), relative)


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [
        (errors(0.02, behind=0.15), None),
        (errors(0.01, behind=0.17), "1 tokens chosen that rounding does not explain"),
        (errors(0.03), "RMS of errors 0.03, above 2 times the reference's 0.01"),
        (errors(0.05), "error of KV 0.05, above 0.044"),
        (errors(np.nan), "error of logits nan"),
    ],
)
def test_errors_are_held_against_those_of_the_reference(kernels: Errors, expected: str | None):
    broken = LIMITS.broken(kernels, errors(0.01))
    assert bool(broken) == (expected is not None)
    assert expected is None or any(expected in line for line in broken)


def test_the_chosen_token_is_judged_by_float32():
    exact = np.array([[0.0, 2.0, 1.0], [5.0, 0.0, 1.0]])
    found = np.array([[0.0, 1.0, 1.5], [4.0, 0.0, 1.0]])
    relative, largest, behind = check_steps._row_errors(found, exact)
    assert relative == pytest.approx([1.25**0.5 / 5**0.5, 1 / 26**0.5])
    assert largest == pytest.approx([1 / exact[0].std(), 1 / exact[1].std()])
    assert behind == pytest.approx([1 / exact[0].std(), 0])


def test_an_implementation_is_named_for_a_while():
    before = dict(api._PROVEN)
    with implementations("mosaic_tpu"):
        assert api._PROVEN == {"tpu": "mosaic_tpu"}
    with implementations("mosaic_gpu"):
        assert api._PROVEN == {"cuda": "mosaic_gpu"}
    with implementations(REFERENCE):
        assert api._PROVEN == {}
    assert before == api._PROVEN
