"""paged_attention: every implementation against plain numpy, and the promises of its interface."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from pallas_kernels.errors import LIMITS, relative_error
from pallas_kernels.paged_attention import api, mosaic_gpu, mosaic_tpu
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.paged_attention.cases import CASES, LARGE_CASES, Case, make_inputs
from pallas_kernels.paged_attention.mosaic_gpu_plan import ByLength
from pallas_kernels.quantised import QuantisedPages, elements_of
from tests.helpers.kernel_cases import check_room, without

needs_gpu_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="Mosaic GPU is interpreted from JAX 0.11 on"
)
SMALL = Case("small", (5, 0, 40))
SMALL_BF16 = replace(SMALL, dtype="bfloat16")
RAGGED = (
    Case("ragged", (70, 1, 260, 129, 0, 65), 1, 3, dtype="bfloat16"),
    Case("ragged window", (70, 1, 0, 330), 1, dtype="bfloat16", sliding_window=260),
    Case("ragged head dim 256", (40, 300), 1, 8, 256, 128, dtype="bfloat16"),
)
"""Rows of one to six blocks of 64 tokens."""
HARDWARE = {
    "v5e": (mosaic_tpu, "tpu", AbstractDevice("TPU v5 lite", 1, platform="tpu")),
    "v6e": (mosaic_tpu, "tpu", AbstractDevice("TPU v6 lite", 1, platform="tpu")),
    "h100": (mosaic_gpu, "cuda", AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")),
}

REPEATED = (
    *("page 64", "head dim 128", "soft cap", "window", "bf16", "bf16 page 64", "bf16 group 1"),
    *("bf16 group 16", "bf16 soft cap", "bf16 int8 gqa 8", "bf16 int8 page 128"),
)
"""Cases whose edges others have, which are neither interpreted nor lowered."""

EVERY = {"v5e": 6, "v6e": 2}
"""Every how many cases one is lowered: the two TPUs hardly differ."""

GPU = ("bf16 gqa 8", "bf16 window", "bf16 int8 page 32")
"""Cases that are interpreted as Hopper's: tests of single promises have the other edges."""

HOPPER = ("bf16 window", "bf16 int8 page 32", "bf16 int8 head dim 256")
"""Cases that are lowered for Hopper: those of `append_attention` have the other edges."""


def name_of(case: Case) -> str:
    return case.name.replace(" ", "_")


def check(case: Case, run: Callable[..., jax.Array]) -> None:
    inputs = make_inputs(case, seed=1)
    actual = np.asarray(jax.jit(partial(run, **case.options))(*inputs.operands))
    assert actual.dtype == inputs.q.dtype
    assert relative_error(actual, inputs.expected) <= LIMITS[case.dtype]


def taken_by(kernel: Any, *cases: Case) -> list[Case]:
    """List the cases that a kernel does not refuse."""
    taken = []
    for case in cases:
        inputs: Any = make_inputs(replace(case, kv_lens=(1,)), seed=0)
        if kernel.refusal(inputs.q, elements_of(inputs.k_pages), inputs.page_table) is None:
            taken.append(case)
    return taken


def pool_of(case: Case, pages: int) -> Any:
    """Return the shapes of K or V."""
    shape = (case.kv_heads, pages, case.page_size, case.head_dim)
    elements = jax.ShapeDtypeStruct(shape, jnp.dtype(case.kv_dtype or case.dtype))
    scales = jax.ShapeDtypeStruct(shape[:-1], jnp.float32)
    return elements if case.kv_dtype is None else QuantisedPages(elements, scales)


BOTH = Case("bf16 int8 window and soft cap", (5, 200), 1, 4, 128, 64, "bfloat16", "int8", 3.0, 100)

TIGHT = tuple(
    Case(f"int8 x {group}", (600,), 1, group, 128, 64, "bfloat16", "int8") for group in (24, 56)
)
"""Cases with a part that leaves the least shared memory."""


def interpreted_tpu(**options: Any) -> Callable[..., jax.Array]:
    return partial(mosaic_tpu.paged_attention, interpret=pltpu.InterpretParams(**options))


def interpreted_gpu(
    parts: int | ByLength | None, *, programs: int = 3, readers: int | None = None, **options: Any
) -> Callable[..., jax.Array]:
    """Run few programs, so that each does several pieces of work and reuses its rings."""
    interpreter = plgpu.InterpretGPUParams(**options)
    return partial(
        mosaic_gpu.paged_attention,
        parts=parts,
        programs=programs,
        readers=readers,
        interpret=interpreter,
    )


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_reference(case: Case):
    check(case, paged_attention)


@pytest.mark.smoke
def test_reference_on_a_small_case():
    check(SMALL, paged_attention)


@pytest.mark.parametrize(
    "case",
    taken_by(
        mosaic_tpu,
        *without(CASES, *REPEATED, "one row", "bf16 page 128", "bf16 window", "bf16 head dim 256"),
    ),
    ids=name_of,
)
def test_tpu_kernel(case: Case):
    """Windows, pages of several blocks and head dim 256 are those of float32."""
    check(case, interpreted_tpu())


@pytest.mark.smoke
def test_tpu_kernel_on_a_small_case():
    check(SMALL, interpreted_tpu())


def test_tpu_kernel_reuses_its_buffer_without_races(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mosaic_tpu, "_MAX_BLOCK_TOKENS", 32)
    case = Case("10 blocks", (300, 0, 33), kv_heads=1, sliding_window=290)
    check(case, interpreted_tpu(detect_races=True))


@needs_gpu_interpreter
@pytest.mark.parametrize(
    "case",
    [*(case for case in CASES if case.name in GPU), BOTH],
    ids=name_of,
)
def test_gpu_kernel(case: Case):
    """Of two KV heads, if the case has them, at head dim 128 over bfloat16; elsewhere of one. Head
    dim 256 over bfloat16, and pages of several blocks, are among whole rows and rows that are cut;
    head dim 256 over int8 is among those of `append_attention`."""
    one_head = case if case.name == "bf16 gqa 8" else replace(case, kv_heads=1)
    check(one_head, interpreted_gpu(parts=2))


@needs_gpu_interpreter
@pytest.mark.parametrize("head_dim", [64, 256])
def test_gpu_kernel_with_whole_rows(head_dim: int):
    """There are more pieces of work than the two slots, or the one, for their queries; some are
    empty, some have one block, some several."""
    case = replace(SMALL_BF16, kv_lens=(70, 0, 5, 140), kv_heads=1, group=3, head_dim=head_dim)
    check(case, interpreted_gpu(parts=1))


@needs_gpu_interpreter
def test_gpu_kernel_over_quantised_pieces_of_any_length():
    """Pieces have no block, one, and an even and an odd number of blocks, for two readers. The
    tests of `append_attention` have whole rows."""
    case = Case("any", (321, 0, 65, 1, 129), 1, 2, 128, 64, "bfloat16", "int8")
    check(case, interpreted_gpu(2))


@needs_gpu_interpreter
@pytest.mark.parametrize("case", RAGGED[1:], ids=name_of)
def test_gpu_kernel_cuts_long_rows(case: Case):
    """Some rows are whole, some in parts, some empty."""
    check(case, interpreted_gpu(ByLength(3, 2)))


@needs_gpu_interpreter
def test_gpu_kernel_cuts_a_row_by_its_own_length():
    """A row has the same bits, however long the others are; a short row, as if none were cut."""
    case = RAGGED[0]
    inputs = make_inputs(case, seed=2)
    run = jax.jit(partial(interpreted_gpu(ByLength(3, 2)), **case.options))
    together = np.asarray(run(*inputs.operands))
    assert relative_error(together, inputs.expected) <= LIMITS[case.dtype]
    whole = np.asarray(jax.jit(partial(interpreted_gpu(1), **case.options))(*inputs.operands))
    short = inputs.kv_lens <= 3 * 64
    assert 0 < short.sum() < len(short)
    np.testing.assert_array_equal(whole[short], together[short])
    for row, others in ((2, 1), (3, 0)):
        lens = np.minimum(inputs.kv_lens, others)
        lens[row] = inputs.kv_lens[row]
        alone = np.asarray(run(*inputs.operands[:-1], lens))
        np.testing.assert_array_equal(alone[row], together[row])


@needs_gpu_interpreter
@pytest.mark.parametrize(
    ("parts", "programs", "readers", "kv_dtype"),
    [(None, 132, 1, None), (ByLength(7, 7), 2, 1, None), (2, 2, 2, "int8")],
)
def test_gpu_kernel_reuses_its_ring_without_races(
    parts: int | ByLength | None,
    programs: int,
    readers: int,
    kv_dtype: str | None,
    capsys: pytest.CaptureFixture[str],
):
    """Rows are in parts; the tests of `append_attention` have rings of whole rows."""
    page_size = 16 if kv_dtype is None else 64
    # As many parts as 132 programs can take are of one block each, however long the row is.
    longest = 600 if parts else 210
    case = Case("10 blocks", (longest, 0, 65), 1, 1, 128, page_size, sliding_window=longest - 10)
    case = replace(case, dtype="bfloat16", kv_dtype=kv_dtype)
    run = interpreted_gpu(parts, programs=programs, readers=readers, detect_races=True)
    check(case, run)
    assert "RACE" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("hardware", "case"),
    [
        pytest.param(hardware, case, id=f"{hardware}-{name_of(case)}")
        for hardware, every in EVERY.items()
        for case in taken_by(mosaic_tpu, *without(CASES, *REPEATED)[::every], LARGE_CASES[-1])
    ]
    + [
        pytest.param("h100", case, id=f"h100-{name_of(case)}")
        for case in (*(each for each in CASES if each.name in HOPPER), LARGE_CASES[-1])
    ],
)
def test_kernels_lower(hardware: str, case: Case):
    kernel, platform, device = HARDWARE[hardware]
    traced = partial(paged_attention, implementation=kernel.__name__.rpartition(".")[2])
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with use_abstract_mesh(mesh):
        lowered = jax.jit(partial(traced, **case.options)).trace(*shapes_of(case))
        text = lowered.lower(lowering_platforms=(platform,)).as_text()
    assert ("tpu_custom_call" if platform == "tpu" else "mosaic_gpu") in text


def shapes_of(case: Case) -> tuple[Any, ...]:
    rows, heads, pool = len(case.kv_lens), case.kv_heads * case.group, pool_of(case, pages=100)
    return (
        jax.ShapeDtypeStruct((rows, heads, case.head_dim), jnp.dtype(case.dtype)),
        pool,
        pool,
        jax.ShapeDtypeStruct((rows, case.width), jnp.int32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )


@pytest.mark.parametrize("case", TIGHT, ids=name_of)
def test_gpu_kernel_has_room(case: Case):
    traced = partial(paged_attention, implementation="mosaic_gpu", **case.options)
    check_room(traced, *shapes_of(case))


@pytest.mark.parametrize(
    ("implementation", "case", "reason"),
    [
        ("mosaic_tpu", replace(SMALL, head_dim=32), "head dim must be a multiple of 64, not 32"),
        ("mosaic_tpu", replace(SMALL_BF16, page_size=8), "multiple of 16, not 8"),
        ("mosaic_tpu", replace(SMALL, dtype="float16"), "not float16"),
        ("mosaic_tpu", replace(SMALL, kv_heads=64, page_size=128), "exceed the buffer"),
        ("mosaic_tpu", replace(SMALL, kv_lens=(16 * 200_000,)), "page table of 800004 bytes"),
        ("mosaic_tpu", replace(SMALL, kv_dtype="int8"), "not float32 and int8"),
        ("mosaic_gpu", SMALL, "both be bfloat16, or the pages int8, not float32 and float32"),
        ("mosaic_gpu", replace(SMALL_BF16, kv_dtype="int8"), "of int8 must be at least 32, not 16"),
        (
            "mosaic_gpu",
            replace(SMALL_BF16, kv_dtype="float8_e4m3fn"),
            "not bfloat16 and float8_e4m3fn",
        ),
        ("mosaic_gpu", replace(SMALL_BF16, head_dim=32), "must be 64, 128 or 256, not 32"),
        ("mosaic_gpu", replace(SMALL_BF16, page_size=24), "multiple of 64, not 24"),
        ("mosaic_gpu", replace(SMALL_BF16, kv_heads=1, group=65), "at most 64 query heads, not 65"),
    ],
)
def test_a_named_kernel_refuses_with_the_reason(implementation: str, case: Case, reason: str):
    pool = pool_of(case, pages=9)
    rows = len(case.kv_lens)
    q = jax.ShapeDtypeStruct((rows, case.kv_heads * case.group, case.head_dim), case.dtype)
    table = jax.ShapeDtypeStruct((rows, case.width), jnp.int32)
    lens = jax.ShapeDtypeStruct((rows,), jnp.int32)
    run = partial(paged_attention, scale=1.0, implementation=implementation)
    with pytest.raises(NotImplementedError, match=f"by {implementation}: .*{reason}"):
        jax.eval_shape(run, q, pool, pool, table, lens)


def test_the_platform_chooses_among_the_proven(monkeypatch: pytest.MonkeyPatch):
    """A kernel runs where it is proven and takes the arguments; elsewhere the reference runs."""
    monkeypatch.setitem(api._PROVEN, "tpu", "mosaic_tpu")

    def kernels_on(platform: str, case: Case) -> int:
        run = jax.jit(partial(paged_attention, **case.options))
        mesh = AbstractMesh((1,), ("x",), abstract_device=HARDWARE["v5e"][2])
        with use_abstract_mesh(mesh):
            traced = run.trace(*make_inputs(case, seed=0).operands)
            return traced.lower(lowering_platforms=(platform,)).as_text().count("tpu_custom_call")

    assert kernels_on("tpu", SMALL) == 1
    assert kernels_on("cpu", SMALL) == 0
    assert kernels_on("tpu", replace(SMALL, head_dim=32)) == 0
    check(SMALL, paged_attention)


def test_a_row_depends_on_nothing_beside_it():
    """A row has the same bits alone, among other rows, and in a wider page table."""
    case = Case("rows", (300, 17, 0, 129), kv_heads=3, group=3)
    inputs = make_inputs(case, seed=2)
    run = jax.jit(partial(paged_attention, **case.options))
    together = np.asarray(run(*inputs.operands))
    wider = np.pad(inputs.page_table, ((0, 0), (0, 50)))
    pools = inputs.k_pages, inputs.v_pages
    for row in range(len(case.kv_lens)):
        one = slice(row, row + 1)
        alone = run(inputs.q[one], *pools, wider[one], inputs.kv_lens[one])
        np.testing.assert_array_equal(np.asarray(alone), together[one])


def shaped(shape: tuple[int, ...], dtype: str) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


SCALED = QuantisedPages(shaped((4, 9, 16, 64), "int8"), shaped((4, 9, 16), "float32"))


def arguments(**changes: Any) -> dict[str, Any]:
    int32, shape = jnp.int32, jax.ShapeDtypeStruct
    good = {
        "q": shape((2, 8, 64), jnp.float32),
        "k_pages": shape((4, 9, 16, 64), jnp.float32),
        "v_pages": shape((4, 9, 16, 64), jnp.float32),
        "page_table": shape((2, 3), int32),
        "kv_lens": shape((2,), int32),
        "scale": 0.125,
    }
    return {**good, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jax.ShapeDtypeStruct((2, 8), jnp.float32)}, r"q must be \[B, N, H\].*\(2, 8\)"),
        ({"q": jax.ShapeDtypeStruct((2, 8, 32), jnp.float32)}, "H = 64, but q has H = 32"),
        ({"q": jax.ShapeDtypeStruct((2, 6, 64), jnp.float32)}, "N = 6 .* K = 4"),
        ({"q": jax.ShapeDtypeStruct((2, 8, 64), jnp.int8)}, "q must be of a floating .* int8"),
        (
            {"v_pages": jax.ShapeDtypeStruct((4, 8, 16, 64), jnp.float32)},
            r"v_pages \[K, P, S, H\] has P = 8, but k_pages has P = 9",
        ),
        (
            {"v_pages": jax.ShapeDtypeStruct((4, 9, 16, 64), jnp.bfloat16)},
            "v_pages is bfloat16, but k_pages is float32",
        ),
        ({"page_table": jax.ShapeDtypeStruct((3, 3), jnp.int32)}, "B = 3, but q has B = 2"),
        ({"page_table": jax.ShapeDtypeStruct((2, 0), jnp.int32)}, r"not be empty.*\(2, 0\)"),
        ({"page_table": jax.ShapeDtypeStruct((2, 3), jnp.int16)}, "must be int32.*int16"),
        ({"kv_lens": jax.ShapeDtypeStruct((2,), jnp.float32)}, "kv_lens must be int32.*float32"),
        ({"scale": 0.0}, "scale must be a finite number > 0, but it is 0.0"),
        ({"scale": float("nan")}, "scale .*nan"),
        ({"logit_soft_cap": -1.0}, "logit_soft_cap .*-1.0"),
        ({"sliding_window": 0}, "sliding_window .*: 0"),
        ({"k_pages": SCALED}, "v_pages is float32, but k_pages is int8 with scales"),
        (
            {"k_pages": SCALED, "v_pages": SCALED._replace(scales=shaped((4, 9, 8), "float32"))},
            r"v_pages.scales \[K, P, S\] has S = 8, but k_pages has S = 16",
        ),
        (
            {"k_pages": SCALED._replace(elements=shaped((4, 9, 16, 64), "int4"))},
            "but they are int4",
        ),
        ({"v_pages": SCALED._replace(scales=shaped((4, 9, 16), "bfloat16"))}, "must be float32"),
        ({"implementation": "cuda"}, "one of reference, mosaic_tpu, mosaic_gpu, not 'cuda'"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str):
    given = arguments(**changes)
    arrays = jax.ShapeDtypeStruct, QuantisedPages
    operands = {k: v for k, v in given.items() if isinstance(v, arrays)}
    options = {k: v for k, v in given.items() if k not in operands}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(partial(paged_attention, **options), *operands.values())
