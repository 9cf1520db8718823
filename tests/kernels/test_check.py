"""`python -m pallas_kernels.check` passes what is right and catches what is wrong."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels import check
from pallas_kernels.kv_write import cases as write_cases
from pallas_kernels.kv_write import reference as write_reference
from pallas_kernels.prefill_attention import cases, reference

CASE = cases.Case("small", ((5, 20), (3, 3)))


def outcome() -> tuple[bool, str]:
    return check.Check(check.PREFILL, "reference", CASE).run(seed=0)


def test_the_reference_passes():
    passed, line = outcome()
    assert passed
    assert line.startswith("ok")
    assert "same bits" in line


@pytest.mark.parametrize(
    "broken",
    [
        lambda out: out * 1.001,
        lambda out: out.at[0, 0, 0].set(np.nan),
    ],
)
def test_a_wrong_result_is_caught(monkeypatch: pytest.MonkeyPatch, broken):
    right = reference.prefill_attention

    def wrong(*operands: jax.Array, **options: Any) -> jax.Array:
        return broken(right(*operands, **options))

    monkeypatch.setattr(reference, "prefill_attention", wrong)
    passed, line = outcome()
    assert not passed
    assert line.startswith("WRONG")


def test_differing_bits_are_caught(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    right = reference.prefill_attention

    def restless(*operands: jax.Array, **options: Any) -> jax.Array:
        out = right(*operands, **options)
        noise = jax.pure_callback(
            lambda: np.float32(rng.random() * 1e-7), jax.ShapeDtypeStruct((), np.float32)
        )
        return out + noise

    monkeypatch.setattr(reference, "prefill_attention", restless)
    passed, line = outcome()
    assert not passed
    assert "BITS DIFFER" in line


@pytest.mark.parametrize(
    ("broken", "verdict"),
    [
        (lambda q, k, v: (q, k, v), "ok"),
        (lambda q, k, v: (q.at[0, 0, 0].add(0.1), k, v), "WRONG"),
        (lambda q, k, v: (q, k, v.at[:, :, 1].multiply(1.001)), "WRONG"),
        (lambda q, k, v: (q, k.at[0, -1, -1, -1].add(1e-6), v), "WRONG  error inf"),
        (lambda q, k, v: (q, k.at[:, 0].set(7), v), "ok"),
    ],
    ids=["right", "q", "written", "unwritten", "null_page"],
)
def test_pools_are_judged_too(monkeypatch: pytest.MonkeyPatch, broken, verdict: str):
    right = write_reference.rope_and_write

    def write(*operands: jax.Array) -> Any:
        return broken(*right(*operands))

    monkeypatch.setattr(write_reference, "rope_and_write", write)
    case = write_cases.Case("small", ((1, 5), (14, 3)), padding=2)
    passed, line = check.Check(check.WRITE, "reference", case).run(seed=0)
    assert passed == (verdict == "ok")
    assert line.startswith(verdict)


def test_a_refused_case_is_not_run():
    case = cases.Case("narrow", ((1, 1),), head_dim=32)
    passed, line = check.Check(check.PREFILL, "mosaic_tpu", case).run(seed=0)
    assert passed
    assert line.startswith("not run: prefill_attention by mosaic_tpu: the head dim")


def test_the_command():
    ran = subprocess.run(
        [sys.executable, "-m", "pallas_kernels.check", "--only=one token", "--seed=1"],
        cwd=Path(__file__).resolve().parents[2],
        env={"JAX_PLATFORMS": "cpu", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "prefill_attention reference: one token" in ran.stdout
    assert ran.stdout.endswith("0 wrong\n")
