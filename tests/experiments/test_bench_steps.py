"""The benchmark of steps: shapes, floors, batches, tables, and a run of the smallest model."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.baselines import vllm
from experiments.bench_steps import __main__ as bench_steps
from experiments.bench_steps import tables as step_tables
from experiments.bench_steps.batches import decode_batches, prefill_batches
from experiments.bench_steps.cases import LARGE, TINY, DecodeCase, PrefillCase
from experiments.bench_steps.floors import decode_bytes, prefill_flops
from experiments.common import kernel_profile
from experiments.common.loops import noise, seconds_a_call
from experiments.common.shapes import MODELS
from pdjax.flags import status
from pdjax.interfaces.batches import USE_FED_BACK

LLAMA = MODELS["llama3_8b"]


@pytest.mark.parametrize("usual", [LARGE, TINY], ids=["large", "tiny"])
def test_cases_are_called_what_they_are_parsed_from(usual):
    for text in (*usual.paged, *usual.append, *usual.decode):
        assert DecodeCase.parse(text).name == text
    for text in (*usual.attention, *usual.prefill):
        assert PrefillCase.parse(text).name == text


@pytest.mark.parametrize("text", ["", "8", "0x5", "x5", "3+", "3+0", "5@", "1x2x3", "a"])
def test_other_shapes_are_refused(text):
    with pytest.raises(ValueError, match="must be"):
        DecodeCase.parse(text)
    with pytest.raises(ValueError, match="must be"):
        PrefillCase.parse(text)


def test_a_case_counts_what_tokens_see():
    assert PrefillCase.parse("2x3").pairs == 2 * (1 + 2 + 3)
    assert PrefillCase.parse("2@4").pairs == 5 + 6
    assert PrefillCase.parse("3+2").pairs == (1 + 2 + 3) + (1 + 2)
    assert PrefillCase.parse("17+1").pages(16) == 3


def test_floors_are_those_worked_out_before():
    """The floors equal numbers worked out by hand for an H100: 2.92 TB/s, and 44.0 k tokens/s at
    708 TFLOP/s."""
    for case, ms in (("1x1060", 5.17), ("64x1060", 8.2)):
        floor = decode_bytes(LLAMA, DecodeCase.parse(case), 2, "bfloat16") / 2.92e12 * 1e3
        assert floor == pytest.approx(ms, rel=0.01)
    saved = [decode_bytes(LLAMA, DecodeCase(1, 1, 1), 2, dtype) for dtype in ("bfloat16", "int8")]
    assert saved[0] - saved[1] == 2 * 32 * 8 * (128 - 4)  # a byte an element, less a scale
    flops = prefill_flops(LLAMA, PrefillCase.parse("1x8192")) / 8192 * 44.0e3
    assert flops == pytest.approx(708e12, rel=0.01)


def test_the_rival_is_measured_at_our_shapes():
    assert set(vllm.DECODE_MS) <= set(LARGE.decode)
    assert set(vllm.PREFILL_TOKENS_PER_S) <= set(LARGE.prefill)


def test_ticks_follow_one_another_around_the_context():
    batches, pages = decode_batches(DecodeCase(3, 40, 3), steps=6, page_size=16, vocab=50)
    read = np.array([batch.positions[0] + 1 for batch in batches])
    assert (read == np.arange(37, 43)[:, None] + np.zeros(3)).all()
    assert (batches[0].tokens >= 0).all() and (batches[1].tokens == USE_FED_BACK).all()
    [few, *_], _ = decode_batches(DecodeCase.parse("3of64x40"), steps=6, page_size=16, vocab=50)
    assert (len(few.tokens), (few.positions >= 0).sum(), len(few.sampling.seed)) == (8, 3, 64)
    table = batches[0].page_table[0]
    assert sorted(table.ravel()) == list(range(1, pages))


def test_earlier_chunks_are_written_by_the_same_program():
    batches, pages = prefill_batches(PrefillCase.parse("8@24"), page_size=16, vocab=50)
    assert [batch.kv_lens.tolist() for batch in batches] == [[8], [16], [24], [32]]
    assert (
        len({tuple(x.shape for x in vars(b).values() if hasattr(x, "shape")) for b in batches}) == 1
    )
    slots = np.concatenate([batch.slot_mapping for batch in batches])
    assert len(set(slots)) == 32 and slots.min() >= 16 and slots.max() < 16 * pages
    [whole], _ = prefill_batches(PrefillCase.parse("5+9"), page_size=16, vocab=50)
    assert whole.cu_q_lens.tolist() == [0, 5, 14] and len(whole.tokens) == 14
    with pytest.raises(ValueError, match="5@8: earlier tokens must be a multiple"):
        prefill_batches(PrefillCase.parse("5@8"), page_size=16, vocab=50)


def test_noise_is_noise():
    x = np.asarray(noise((64, 1000), jnp.float32, 3))
    assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02
    assert np.abs(np.corrcoef(x[:8]) - np.eye(8)).max() < 0.15
    assert not np.array_equal(x, noise((64, 1000), jnp.float32, 4))


def test_calls_take_turns_at_their_operands():
    seen = []

    def operation(carry, operand):
        jax.debug.callback(lambda x: seen.append(int(x)), operand, ordered=True)
        return carry + operand

    operands = [jnp.int32(10), jnp.int32(20)]
    seconds = seconds_a_call(operation, jnp.int32(0), operands, calls=8, seconds=0.0, rounds=1)
    jax.effects_barrier()
    assert seconds > 0
    assert seen[:8] == [10, 20] * 4 and len(seen) % 8 == 0


def test_kernels_are_counted_by_name():
    def event(name, us):
        return SimpleNamespace(name=name, duration_ns=us * 1e3)

    def line(name, *events):
        return SimpleNamespace(name=name, events=events)

    stream = line("Stream #1(Compute)", event("gemm", 5), event("gemm", 7), event("norm", 2))
    gpu = SimpleNamespace(name="/device:GPU:0", lines=[stream, line("XLA Ops", event("gemm", 5))])
    host = SimpleNamespace(name="/host:CPU", lines=[line("Stream", event("python", 9))])
    found = kernel_profile.rows([host, gpu], steps=2)
    assert [(row.name, row.count, row.total_us, row.each_us) for row in found] == [
        ("gemm", 1.0, 6.0, 6.0),
        ("norm", 0.5, 1.0, 2.0),
    ]
    assert kernel_profile.show(found).splitlines()[-1].split()[0] == "all"
    assert "no device" in kernel_profile.show([])


def test_a_line_leaves_out_what_is_not_known():
    row = {"case": "1x8", "ms": 2.0, "floor_ms": None, "ratio": None, "temporary_bytes": 5e6}
    assert step_tables.line("decode", row) == "decode 1x8: ms a tick 2.00; temporary, MB 5"


def test_a_run_measures_what_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "steps.json"
    argv = ["bench_steps", "--model=tiny", "--layers=1", "--only=2", "--decode=2x16", "--steps=3"]
    argv += [
        "--kv_dtype=int8",
        "--prefill=2x8",
        "--prefill=5@12",
        "--mixed=2x16/1x8",
        "--rounds=1",
        "--profile",
        f"--out={out}",
    ]
    assert status(bench_steps.main, bench_steps.FLAGS, "", argv) == 1
    whole = json.loads(out.read_text())
    assert whole["failed"] == ["prefill 5@12"]  # the other cases ran
    [tick], [step] = whole["decode"], whole["prefill"]
    assert (tick["case"], step["case"]) == ("2x16", "2x8")
    assert tick["ratio"] == pytest.approx(tick["ms"] / tick["floor_ms"])
    assert step["tokens_per_s"] == pytest.approx(16 / step["ms"] * 1e3)
    assert {row["kernel"] for row in whole["kernels"]} == {"append_attention", "prefill_attention"}
    assert whole["layers"] == "1 of 3" and "vllm_ms" not in tick and whole["commit"] is not None
    [mixed] = whole["mixed"]
    parts = mixed["products_ms"] + mixed["kv_ms"]
    assert mixed["of_parts"] == pytest.approx(mixed["ms"] / parts)
    assert set(whole["profiles"]) == {"decode 2x16", "prefill 2x8", "mixed 2x16/1x8"}
    assert "FAILED prefill 5@12" in capsys.readouterr().out


def test_a_wrong_command_line_is_refused_at_once(capsys: pytest.CaptureFixture[str]):
    for argument in ("--sections=decoding", "--rounds=0", "--attention=triton"):
        assert status(bench_steps.main, bench_steps.FLAGS, "", ["bench_steps", argument]) == 2
    assert "sections='decoding': allowed are ceilings" in capsys.readouterr().err
