"""append_attention equals rope_and_write and then paged_attention, as one kernel or as two."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec, use_abstract_mesh

from pallas_kernels.errors import LIMITS, append_error
from pallas_kernels.kv_write.api import rope_and_write
from pallas_kernels.paged_attention import append_cases, mosaic_gpu
from pallas_kernels.paged_attention.api import append_attention, paged_attention
from pallas_kernels.paged_attention.cases import CASES, Case, make_inputs
from pallas_kernels.paged_attention.mosaic_gpu_plan import ByLength
from tests.helpers.kernel_cases import check_room

needs_gpu_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="Mosaic GPU is interpreted from JAX 0.11 on"
)
SMALL = Case("small", (5, 0, 40))
SMALL_BF16 = replace(SMALL, dtype="bfloat16")
SMALL_INT8 = replace(SMALL_BF16, kv_heads=1, kv_dtype="int8", page_size=64)
TPU = AbstractDevice("TPU v5 lite", 1, platform="tpu")
H100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")
APPENDED = (
    Case(
        "page 8, window and soft cap",
        (3, 70),
        kv_heads=1,
        group=1,
        head_dim=128,
        page_size=8,
        dtype="bfloat16",
        logit_soft_cap=3.0,
        sliding_window=20,
    ),
    Case("int8 window", (140, 7), 1, 11, 128, 64, "bfloat16", "int8", sliding_window=20),
    replace(SMALL_INT8, name="int8 head dim 256", kv_lens=(33, 70), kv_heads=1, head_dim=256),
)
"""Cases at which the Hopper kernel is interpreted. `test_poison` has edges of blocks, both over
bfloat16 and over int8."""

UNEVEN = Case("any", (321, 0, 65, 1, 129), 1, 8, 128, 64, "bfloat16")

WIDE = Case("head dim 256", (33, 70), 1, head_dim=256, page_size=128, dtype="bfloat16")

FULL = tuple(
    replace(SMALL_INT8, name=f"int8 {dim} x {group}", kv_lens=(70,), group=group, head_dim=dim)
    for dim, group in ((128, 22), (256, 8), (128, 62))
)
"""The most query heads that fit beside int8 pages, and at head dim 128 also two readers with 22
heads, which leave the least room for parts. Head dim 64 has room for its most."""


def newest_tokens(case: Case, seed: int, *, bias: bool) -> tuple[Any, ...]:
    """Make the arguments of `append_attention` before the pages: qkv, row_scale, bias, cos, sin."""
    rng = np.random.default_rng(seed)
    rows, heads = len(case.kv_lens), (case.kv_heads, case.group + 2, case.head_dim)
    qkv = rng.standard_normal((rows, *heads), np.float32).astype(jnp.dtype(case.dtype))
    angles = rng.uniform(0, 6, (rows, case.head_dim // 2)).astype(np.float32)
    row_scale = rng.uniform(0.5, 2, rows).astype(np.float32)
    shift = rng.standard_normal(heads, np.float32).astype(jnp.dtype(case.dtype))
    return qkv, row_scale, shift if bias else None, np.cos(angles), np.sin(angles)


@pytest.mark.parametrize(
    ("case", "bias"),
    [
        (SMALL, False),
        (SMALL, True),
        (SMALL_BF16, True),
        (replace(SMALL, name="float8", kv_dtype="float8_e4m3fn"), False),
        *((case, False) for case in CASES if case.name in ("page edges", "int8")),
        *((case, True) for case in CASES if case.name in ("window", "bf16 int8")),
    ],
    ids=lambda x: x.name if isinstance(x, Case) else str(x),
)
def test_append_is_write_then_attend(case: Case, bias: bool):
    """The newest token's K and V are written to its slot in the row's pages, nothing else changes,
    and attention sees them. Nothing is jitted, since XLA may round what it fuses in another way."""
    inputs = make_inputs(case, seed=3)
    token = newest_tokens(case, seed=4, bias=bias)
    pools, table, lens = (inputs.k_pages, inputs.v_pages), inputs.page_table, inputs.kv_lens
    arrays: Any = jax.tree.map(jnp.asarray, (*token, *pools))
    rows: Any = jnp.asarray(table), jnp.asarray(lens)
    o, *after = append_attention(*arrays, *rows, **case.options)
    at = np.maximum(lens - 1, 0)
    page = table[np.arange(len(lens)), at // case.page_size]
    slots = np.where(lens > 0, page * case.page_size + at % case.page_size, 0).astype(np.int32)
    write: Any = rope_and_write
    q, *written = write(*arrays, jnp.asarray(slots))
    sides = (jax.tree.leaves(side) for side in (after, written, pools))  # scales are sides, too
    for arrays in zip(*sides, strict=True):
        ours, theirs, before = (np.asarray(array, np.float32) for array in arrays)
        np.testing.assert_array_equal(ours[:, 1:], theirs[:, 1:])  # all but the null page
        changed = np.zeros(before.shape[1:3], bool)
        changed[page[lens > 0], at[lens > 0] % case.page_size] = True
        changed[0] = True
        np.testing.assert_array_equal(ours[:, ~changed], before[:, ~changed])
    expected = paged_attention(q, *written, *rows, **case.options)
    assert o.dtype == token[0].dtype
    np.testing.assert_array_equal(o, expected)
    assert not np.asarray(o)[lens == 0].any()


def test_append_updates_donated_pools_in_place():
    inputs = make_inputs(SMALL, seed=0)
    run = jax.jit(partial(append_attention, **SMALL.options), donate_argnums=(5, 6))
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
        (*newest_tokens(SMALL, 0, bias=False), *inputs.operands[1:]),
    )
    pool = jax.ShapeDtypeStruct((2, 5000, 16, 64), jnp.float32)
    memory = run.lower(*shapes[:5], pool, pool, *shapes[7:]).compile().memory_analysis()
    assert memory is not None
    pool_bytes = 4 * pool.size
    assert memory.alias_size_in_bytes >= 2 * pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 20


def check_gpu(
    case: Case,
    *,
    bias: bool = False,
    parts: int | ByLength | None = None,
    programs: int = 3,
    readers: int | None = None,
    **options: Any,
) -> None:
    inputs = append_cases.make_inputs(case, seed=5)
    if bias:
        shift = newest_tokens(case, seed=6, bias=True)[2]
        inputs = replace(inputs, write=replace(inputs.write, bias=shift))
    run = partial(
        mosaic_gpu.append_attention,
        parts=parts,
        programs=programs,  # few, so that each does several pieces of work and reuses its rings
        readers=readers,
        interpret=plgpu.InterpretGPUParams(**options),
        **case.options,
    )
    outputs = jax.tree.map(np.asarray, jax.jit(run)(*inputs.operands))
    assert outputs[0].dtype == inputs.paged.q.dtype
    assert append_error(inputs, outputs) <= LIMITS[case.dtype]


@needs_gpu_interpreter
@pytest.mark.parametrize("case", APPENDED, ids=lambda case: case.name)
def test_gpu_kernel(case: Case):
    """Rows are whole. Rows in parts are in `test_poison`, and rows cut by their length below."""
    check_gpu(case, bias=case.kv_dtype is None, parts=1)


@needs_gpu_interpreter
def test_gpu_kernel_cuts_long_rows():
    """Parts of one block each: in a long row beside others, only the first part sees the newest
    token. Without a window, `test_gpu_kernel_takes_pieces_of_any_length` has such rows."""
    case = replace(SMALL_BF16, kv_lens=(140, 7, 0), kv_heads=1, sliding_window=20)
    check_gpu(case, parts=ByLength(1, 1))


@needs_gpu_interpreter
@pytest.mark.parametrize(("parts", "kv_dtype"), [(ByLength(3, 2), None), (1, "int8")])
def test_gpu_kernel_takes_pieces_of_any_length(parts: int | ByLength, kv_dtype: str | None):
    """Pieces have no block, one, and an even and an odd number of blocks. Over int8 they are whole;
    the tests of `paged_attention` have them in parts."""
    check_gpu(replace(UNEVEN, kv_dtype=kv_dtype), parts=parts, programs=2)


@needs_gpu_interpreter
@pytest.mark.parametrize(("readers", "kv_dtype"), [(1, None), (2, "int8")])
def test_gpu_kernel_reuses_its_ring_without_races(
    readers: int, kv_dtype: str | None, capsys: pytest.CaptureFixture[str]
):
    """Rows are whole; the tests of `paged_attention` have rings of rows in parts.

    The newest tokens begin a block. Where one does not, its block is read while it is written,
    which the detector calls a race, although the numbers read of it are masked.
    """
    page_size = 16 if kv_dtype is None else 64
    case = Case(
        "10 blocks",
        (641, 0, 65),
        kv_heads=1,
        head_dim=128,
        page_size=page_size,
        dtype="bfloat16",
        kv_dtype=kv_dtype,
    )
    check_gpu(case, parts=1, programs=1, readers=readers, detect_races=True)
    assert "RACE" not in capsys.readouterr().out


def shapes_of(case: Case) -> Any:
    inputs = make_inputs(case, seed=0)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
        (*newest_tokens(case, 0, bias=True), *inputs.operands[1:]),
    )


@pytest.mark.parametrize("case", FULL, ids=lambda case: case.name)
def test_gpu_kernel_has_room_for_the_most_query_heads(case: Case):
    """Two parts take more memory than one."""
    check_room(partial(mosaic_gpu.append_attention, parts=2, **case.options), *shapes_of(case))


@pytest.mark.parametrize(
    ("case", "parts"),
    [(APPENDED[0], 2), (WIDE, ByLength(1, 1))],
    ids=lambda x: x.name if isinstance(x, Case) else str(x),
)
def test_gpu_kernel_lowers(case: Case, parts: int | ByLength):
    """The pools are updated in place: the kernel's results are the given pools. Where the platform
    chooses, head dim 64 is lowered, and int8."""
    run = partial(mosaic_gpu.append_attention, parts=parts, **case.options)
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=H100)
    with use_abstract_mesh(mesh):
        traced = jax.jit(run, donate_argnums=(5, 6)).trace(*shapes_of(case))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1
    assert text.count("output_operand_alias<") == 2


@pytest.mark.parametrize(
    ("platform", "case", "kernels"),
    [
        ("cuda", SMALL_BF16, 1),
        ("cuda", SMALL, 0),
        ("cuda", replace(SMALL_BF16, page_size=24), 0),
        ("cuda", replace(APPENDED[1], logit_soft_cap=3.0), 1),
        ("cuda", replace(SMALL_INT8, page_size=16), 0),
        ("cuda", replace(SMALL_INT8, kv_dtype="float8_e4m3fn"), 0),
        ("cpu", SMALL_INT8, 0),
        ("cpu", SMALL_BF16, 0),
    ],
)
def test_the_platform_chooses_also_within_shard_map(platform: str, case: Case, kernels: int):
    """Hopper's kernel, which updates the pools in place, where it takes the arguments; the
    reference everywhere else."""
    case = replace(case, kv_heads=2)  # a shard each
    operands = (*newest_tokens(case, 0, bias=False), *make_inputs(case, seed=0).operands[1:])
    mesh = AbstractMesh((2,), ("tp",), axis_types=(AxisType.Auto,), abstract_device=H100)
    heads, pool = PartitionSpec(None, "tp"), PartitionSpec("tp")
    run = jax.shard_map(
        partial(append_attention, **case.options),
        mesh=mesh,
        in_specs=(heads, *[PartitionSpec()] * 4, pool, pool, *[PartitionSpec()] * 2),
        out_specs=(heads, pool, pool),
        check_vma=False,
    )
    traced = jax.jit(run, donate_argnums=(5, 6)).trace(*operands)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == kernels
    if kernels:
        assert text.count("output_operand_alias<") == (2 if case.kv_dtype is None else 4)


@pytest.mark.parametrize("case", [SMALL, replace(SMALL_BF16, sliding_window=20)])
def test_append_lowers_for_tpu(case: Case):
    token, inputs = newest_tokens(case, 0, bias=True), make_inputs(case, seed=0)
    run = partial(append_attention, implementation="mosaic_tpu", **case.options)
    mesh = AbstractMesh((1,), ("x",), abstract_device=TPU)
    with use_abstract_mesh(mesh):
        traced = jax.jit(run).trace(*token, *inputs.operands[1:])
        assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(
    ("implementation", "case", "reason"),
    [
        ("mosaic_tpu", replace(SMALL, head_dim=32), "head dim must be a multiple of 64, not 32"),
        ("mosaic_tpu", SMALL_INT8, "not bfloat16 and int8"),
        ("mosaic_gpu", SMALL, "both be bfloat16, or the pages int8, not float32"),
    ],
)
def test_a_named_kernel_refuses_to_append_with_the_reason(
    implementation: str, case: Case, reason: str
):
    operands = (*newest_tokens(case, 0, bias=False), *make_inputs(case, seed=0).operands[1:])
    run = partial(append_attention, scale=1.0, implementation=implementation)
    with pytest.raises(NotImplementedError, match=f"append_attention by .*: .*{reason}"):
        jax.eval_shape(run, *operands)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda x: x[:, :, :2], r"J = G \+ 2 of at least 3 rows, but J = 2"),
        (1, lambda x: x[:1], "scale .* has T = 1, but qkv has T = 3"),
        (1, lambda x: x.astype(np.int32), "scale must be float32, but it is int32"),
        (3, lambda x: x[:, :5], "has I = 32, but cos has I = 5"),
        (5, lambda x: x[:1], "v_pages .* has K = 2, but k_pages has K = 1|K = 1, but qkv"),
        (7, lambda x: x.astype(np.int16), "page_table must be int32"),
        (8, lambda x: x[:2], "kv_lens .* has B = 2, but"),
    ],
)
def test_bad_arguments_of_append_are_named(
    place: int, change: Callable[[np.ndarray], np.ndarray], message: str
):
    operands = [*newest_tokens(SMALL, 0, bias=False), *make_inputs(SMALL, seed=0).operands[1:]]
    operands[place] = change(operands[place])
    with pytest.raises(ValueError, match=message):
        append_attention(*operands, scale=1.0)


@pytest.mark.parametrize(
    ("head_dim", "group", "fits"),
    [(64, 62, True), (128, 62, True), (256, 8, True), (256, 32, False)],
)
def test_gpu_kernel_refuses_int8_where_there_is_no_room(head_dim: int, group: int, fits: bool):
    qkv = jax.ShapeDtypeStruct((1, 1, group + 2, head_dim), jnp.bfloat16)
    pages: Any = jax.ShapeDtypeStruct((1, 3, 64, head_dim), jnp.int8)
    refusal = mosaic_gpu.append_refusal(qkv, pages, pages)  # type: ignore[arg-type]
    assert refusal is None if fits else "no room for pages of int8" in (refusal or "")
