"""`python -m pallas_kernels.check` passes correct implementations and catches wrong ones."""

import re
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import check, errors, naive
from pallas_kernels.kv_write import cases as write_cases
from pallas_kernels.kv_write import reference as write_reference
from pallas_kernels.paged_attention import append_cases
from pallas_kernels.paged_attention.api import append_attention
from pallas_kernels.prefill_attention import cases, reference
from pallas_kernels.swiglu import cases as swiglu_cases

CASE = cases.Case("small", ((5, 20), (3, 3)))


def run(subject: check.Subject, implementation: str, case: Any) -> tuple[bool, str]:
    return check.Check(subject, implementation, case).run(subject.cases.make_inputs(case, 0))


def outcome() -> tuple[bool, str]:
    return run(check.PREFILL, "reference", CASE)


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
    passed, line = run(check.WRITE, "reference", case)
    assert passed == (verdict == "ok")
    assert line.startswith(verdict)


def _changed(outputs: Any, index: tuple[int, ...], *, scale: bool = False) -> Any:
    o, k_pages, v_pages = jax.tree.map(np.copy, outputs)
    if scale:
        v_pages.scales[index] *= 1.5
    else:
        v_pages.elements[index] ^= 8
    return o, k_pages, v_pages


def test_pools_with_scales_are_judged_too():
    case = append_cases.Case("small", (20, 0, 33), kv_dtype="int8")
    inputs = append_cases.make_inputs(case, seed=0)
    append = partial(append_attention, implementation="reference", **case.options)
    right = jax.tree.map(np.asarray, jax.jit(append)(*inputs.operands))
    error = errors.append_error(inputs, right)
    assert error <= errors.LIMITS["float32"]
    page, position = (int(x[0]) for x in inputs.write.written)
    kept = tuple(int(x[0]) for x in np.nonzero(inputs.write.kept))
    assert errors.append_error(inputs, _changed(right, (0, *kept, 0))) == np.inf
    assert errors.append_error(inputs, _changed(right, (1, *kept, 63))) == np.inf
    # The scale of a token that a row sees: NaN times any scale would stay the same.
    seen = (0, int(inputs.paged.page_table[2, 0]), 5)
    assert inputs.write.kept[seen[1:]]
    assert errors.append_error(inputs, _changed(right, seen, scale=True)) == np.inf
    written = _changed(right, (0, page, position, 0))
    assert errors.LIMITS["float32"] < errors.append_error(inputs, written) < np.inf
    assert errors.append_error(inputs, _changed(right, (0, 0, 0, 0))) == error


def test_what_rounding_explains_of_swiglu_is_right():
    """Products lie just past the middle between 1 and the next bfloat16, so the reference rounds
    them up. Scales bring gates to where silu is steep, and some results to a middle. numpy rounds,
    since XLA may keep more digits where it fuses so small a product."""
    scale = np.linspace(1, 1.6, 4000, dtype=np.float32)
    x = np.tile(np.array([1, 1.01 * 2**-8], jnp.bfloat16), (len(scale), 1))
    case = swiglu_cases.Case("half-way", len(scale), 2, 1, dtype="bfloat16")
    inputs = swiglu_cases.Inputs(case, x, scale, np.ones((2, 2, 1), jnp.bfloat16))
    product = x.astype(np.float32).sum(axis=1).astype(jnp.bfloat16)
    gate = up = product.astype(np.float32) * scale
    out = (gate / (1 + np.exp(-gate)) * up).astype(jnp.bfloat16)[:, None]
    error = errors.swiglu_error(inputs, out)
    assert 3.2 * 2**-8 < error <= check.SWIGLU.limits["bfloat16"]
    assert error > errors.LIMITS["bfloat16"]


def test_inputs_and_answers_are_made_once_a_case(monkeypatch: pytest.MonkeyPatch):
    made, answers = [], []
    make_inputs, naive_attention = cases.make_inputs, naive.naive_attention

    def make(*args: Any) -> cases.Inputs:
        inputs = make_inputs(*args)
        made.append(weakref.ref(inputs))
        return inputs

    def answer(*args: Any, **options: Any) -> np.ndarray:
        answers.append(naive_attention(*args, **options))
        return answers[-1]

    monkeypatch.setattr(cases, "make_inputs", make)
    monkeypatch.setattr(cases, "naive_attention", answer)
    names = "reference", "no such thing", "reference"
    together = [check.Check(check.PREFILL, name, CASE) for name in names]
    lines = list(check.outcomes(together, seed=0))
    assert [label for label, _, _ in lines] == [
        f"prefill_attention {name}: small" for name in names
    ]
    assert [passed for _, passed, _ in lines] == [True, False, True]
    assert lines[1][2] == "WRONG  ValueError"
    assert len(answers) == len(CASE.chunks)
    assert [ref() for ref in made] == [None]  # one was made, and it is freed


def test_every_implementation_is_checked_at_every_case():
    groups = list(check.checks("gpu"))
    for together in groups:
        assert len({(x.subject.operation, x.case) for x in together}) == 1
    labels = [x.label for together in groups for x in together]
    assert len(set(labels)) == len(labels)
    for subject in check.SUBJECTS:
        names = [name for name, platforms in subject.platforms.items() if "gpu" in platforms]
        all_cases = subject.cases.CASES + subject.cases.LARGE_CASES
        of_subject = [x for x in labels if x.startswith(f"{subject.operation.__name__} ")]
        assert len(of_subject) == len(names) * len(all_cases)


def test_large_arrays_are_random_throughout():
    def draw(seed: int) -> np.ndarray:
        return naive.normal(np.random.default_rng(seed), (3, 200, 1000), lambda x: x)

    numbers = draw(0)
    assert numbers.dtype == np.float32
    for part in numbers.reshape(-1, 100_000):
        assert abs(part.mean()) < 0.02 and abs(part.std() - 1) < 0.02
        assert len(np.unique(part)) > 45_000  # 100,000 draws from 65,536 show 51,300
    rows = numbers.reshape(-1, 100)
    assert len(np.unique(rows, axis=0)) == len(rows)
    np.testing.assert_array_equal(numbers, draw(0))
    assert (numbers != draw(1)).mean() > 0.99


def test_a_refused_case_is_not_run():
    case = cases.Case("narrow", ((1, 1),), head_dim=32)
    passed, line = run(check.PREFILL, "mosaic_tpu", case)
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
    assert re.search(r"\n0 wrong in \d+ s\n$", ran.stdout)
