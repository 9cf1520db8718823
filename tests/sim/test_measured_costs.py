"""Costs that are fitted to measured steps, and what they say of batches."""

from dataclasses import replace

import numpy as np
import pytest

from pdjax.interfaces.batches import IDLE_ROW
from pdjax.sim.measured_costs import MeasuredCosts, fit
from pdjax.sim.step_cases import DecodeCase, MixedCase, PrefillCase
from tests.sim.batches import decode_batch, prefill_batch

TRUE = MeasuredCosts(
    prefill_step=4e-4,
    prefill_token=2e-5,
    prefill_pair=1e-9,
    tick=4e-3,
    tick_row=1e-5,
    tick_kv_token=3e-8,
)
DECODE = [DecodeCase.parse(name) for name in ("1x1000", "16x1000", "64x1000", "32x8000")]
PREFILL = [PrefillCase.parse(name) for name in ("1x1024", "4x1024", "1x8192", "2048@6144")]
MIXED = [MixedCase.parse(name) for name in ("64x1000/1x512", "16x1000/512@1536")]


def measured(
    costs: MeasuredCosts,
) -> tuple[list[tuple[DecodeCase, float]], list[tuple[PrefillCase, float]]]:
    decode = [(case, costs.of_decode(case)) for case in DECODE]
    return decode, [(case, costs.of_prefill(case)) for case in PREFILL]


def test_coefficients_are_found_again():
    found, points = fit(*measured(TRUE))
    for name, value in vars(TRUE).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-6), name
    assert all(abs(point.error) < 1e-9 for point in points)


def test_what_was_not_seen_costs_nothing_rather_than_less():
    falling = replace(TRUE, tick_row=0.0)
    decode, prefill = measured(falling)
    decode[2] = decode[2][0], decode[2][1] * 0.97  # more rows took less time
    found, points = fit(decode, prefill)
    assert found.tick_row == 0.0 and found.tick > 0 and found.tick_kv_token > 0
    assert 0 < max(abs(point.error) for point in points) < 0.03


def test_a_step_reads_the_experts_that_its_tokens_touch():
    """A tick of twice the rows takes less than twice as long, up to where all are touched."""
    true = replace(TRUE, tick_experts=6e-3, share_used=1 / 8)
    decode, prefill = measured(true)
    decode.append((DecodeCase.parse("4x500"), true.of_decode(DecodeCase.parse("4x500"))))
    found, _ = fit(decode, prefill, share_used=1 / 8)
    assert vars(found) == pytest.approx(vars(true), rel=1e-6)
    one, two, many = (
        found.tick_seconds(decode_batch([[99] * n + [IDLE_ROW] * (64 - n)])) for n in (1, 2, 64)
    )
    seen = 100 * found.tick_kv_token
    assert two - one == pytest.approx(7 / 64 * 6e-3 + seen)  # 15/64 of the experts, not 1/8
    assert many - one < 7 / 8 * 6e-3 + 63 * seen
    few = prefill_batch([1])
    assert found.prefill_seconds(few) == pytest.approx(4e-3 + 6e-3 / 8 + found.prefill_pair)
    with pytest.raises(ValueError, match="decode: 3 shapes were measured; at least 4 are needed"):
        fit(decode[:3], prefill, share_used=1 / 8)


def test_mixed_steps_scale_what_is_worked_out():
    mixed = [(case, 1.1 * TRUE.of_mixed(case)) for case in MIXED]
    decode, prefill = measured(TRUE)
    found, points = fit(decode, prefill, mixed)
    assert found.mixed_scale == pytest.approx(1.1)
    assert [p.kind for p in points[-2:]] == ["mixed", "mixed"]
    assert abs(points[-1].error) < 1e-9


@pytest.mark.parametrize(
    ("decode", "prefill", "message"),
    [
        (DECODE[:2], PREFILL, "decode: 2 shapes were measured; at least 3"),
        (DECODE[:3], PREFILL, "decode: 3 shapes were measured; at least 3"),  # of one length
        (DECODE, PREFILL[:2], "prefill: 2 shapes"),
    ],
)
def test_too_few_shapes_are_refused(decode, prefill, message: str):
    with pytest.raises(ValueError, match=message):
        fit([(case, 1.0) for case in decode], [(case, 1.0) for case in prefill])


def test_a_batch_costs_what_its_shape_does():
    chunks = prefill_batch([300, 200], before=[0, 100])
    case = PrefillCase(((300, 0), (200, 100)))
    assert TRUE.prefill_seconds(chunks) == pytest.approx(TRUE.of_prefill(case))
    rows = decode_batch([[999] * 16])
    assert TRUE.tick_seconds(rows) == pytest.approx(TRUE.of_decode(DecodeCase(16, 1000, 16)))
    both = TRUE.of_mixed(MixedCase(DecodeCase(16, 1000, 16), case))
    assert TRUE.mixed_seconds(chunks, rows) == pytest.approx(both)


def test_rows_without_a_sequence_are_computed_and_read_nothing():
    few = decode_batch([[999] * 2 + [IDLE_ROW] * 14])
    assert TRUE.tick_seconds(few) == pytest.approx(4e-3 + 16 * 1e-5 + 2000 * 3e-8)


def test_a_small_chunk_takes_as_long_as_the_weights():
    assert TRUE.of_prefill(PrefillCase.parse("1x16")) == pytest.approx(4e-3, rel=1e-3)


def test_a_mixed_step_is_longer_than_either_and_shorter_than_both():
    for case in MIXED:
        parts = TRUE.of_decode(case.rows), TRUE.of_prefill(case.chunks)
        assert max(parts) < TRUE.of_mixed(case) < sum(parts)
    assert np.isfinite(TRUE.of_mixed(MIXED[0]))
