"""gather and scatter of pages: every implementation against plain numpy, and the promises of their
interface."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from pallas_kernels.errors import scatter_error
from pallas_kernels.page_copy import cases, mosaic_gpu, scatter_cases
from pallas_kernels.page_copy.api import gather, scatter
from pallas_kernels.page_copy.cases import CASES, LARGE_CASES, Case
from tests.helpers.kernel_cases import without

needs_gpu_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="Mosaic GPU is interpreted from JAX 0.11 on"
)
SMALL = Case("small", 2, 3, null=1)
POOL = jax.ShapeDtypeStruct((2, 9, 16, 64), jnp.float32)
IDS = jax.ShapeDtypeStruct((3,), jnp.int32)


def name_of(case: Case) -> str:
    return case.name.replace(" ", "_")


def pool_of(case: Case, pages: int = 9) -> Any:
    shape = case.kv_heads, pages, case.page_size, case.head_dim
    return jax.ShapeDtypeStruct(shape, jnp.dtype(case.dtype))


needs_jax_11 = pytest.mark.skipif(
    jax.__version_info__ < mosaic_gpu._JAX, reason="the kernel needs JAX 0.11"
)


def taken_but(*names: str) -> list[Case]:
    """The cases that the GPU kernel takes, but for these; none where it needs a newer JAX."""
    return [each for each in without(CASES, *names) if mosaic_gpu.refusal(pool_of(each)) is None]


LOWERED = (
    *taken_but("one page", "three pools", "with null pages", "only null pages", "bf16"),
    LARGE_CASES[-1],
)
"""Cases that differ in the sizes of pages and in the numbers of pools, not in the numbers of
ids."""


def check_gather(case: Case, run: Callable[..., Any]) -> None:
    inputs = cases.make_inputs(case, seed=1)
    out = jax.jit(partial(run, **case.options))(*inputs.operands)
    assert out.dtype == inputs.expected.dtype
    np.testing.assert_array_equal(np.asarray(out), inputs.expected)


def check_scatter(case: Case, run: Callable[..., Any]) -> None:
    inputs = scatter_cases.make_inputs(case, seed=1)
    outputs = jax.tree.map(np.asarray, jax.jit(run)(*inputs.operands))
    assert scatter_error(inputs, outputs) == 0


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_reference(case: Case):
    check_gather(case, gather)
    check_scatter(case, scatter)


@pytest.mark.smoke
def test_reference_on_a_small_case():
    check_gather(SMALL, gather)
    check_scatter(SMALL, scatter)


@needs_gpu_interpreter
@pytest.mark.parametrize("case", taken_but("more pools than a kernel takes"), ids=name_of)
def test_gpu_kernel(case: Case):
    check_gather(case, interpreted(case))


@needs_gpu_interpreter
def test_more_pools_than_a_gpu_kernel_takes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mosaic_gpu, "_POOLS", 2)
    case = Case("five pools", 5, 2, kv_heads=1)
    check_gather(case, interpreted(case))


def interpreted(case: Case) -> Callable[..., jax.Array]:
    interpret = plgpu.InterpretGPUParams()
    heads = slice(*(case.heads or (0, case.kv_heads)))

    def run(*operands: Any, **_: Any) -> jax.Array:
        return mosaic_gpu.gather(*operands, heads=heads, interpret=interpret)

    return run


@needs_gpu_interpreter
def test_gpu_kernel_has_no_races(capsys: pytest.CaptureFixture[str]):
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    case = Case("races", 2, 5, page_size=64, head_dim=128, dtype="bfloat16")
    check_gather(case, partial(mosaic_gpu.gather, heads=slice(0, 2), interpret=interpret))
    assert "RACE" not in capsys.readouterr().out


def lowered(run: Callable[..., Any], *operands: Any) -> str:
    device = AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with use_abstract_mesh(mesh):
        traced = jax.jit(run).trace(*operands)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@needs_jax_11
@pytest.mark.parametrize("case", LOWERED, ids=name_of)
def test_gpu_kernel_lowers(case: Case):
    """Kernels of one program share a lowering, except one with fewer pools, and write into one
    array."""
    ids = jax.ShapeDtypeStruct((case.ids,), jnp.int32)
    run = partial(gather, implementation="mosaic_gpu", **case.options)
    text = lowered(run, (pool_of(case),) * case.arrays, ids)
    whole, rest = divmod(case.arrays, mosaic_gpu._POOLS)
    kernels = (whole > 0) + (rest > 0)
    assert text.count("@mosaic_gpu") == text.count("output_operand_alias<") == kernels
    assert text.count("@AllocateBuffer") == 1


@needs_jax_11
def test_the_platform_chooses_among_the_proven():
    assert "mosaic_gpu" in lowered(gather, (POOL,), IDS)
    narrow = jax.ShapeDtypeStruct((2, 9, 16, 6), jnp.float32)
    assert "mosaic_gpu" not in lowered(gather, (narrow,), IDS)
    check_gather(SMALL, gather)


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        pytest.param(
            "bfloat16",
            marks=pytest.mark.skipif(
                jax.__version_info__ < (0, 11), reason="XLA on the CPU widened such pools"
            ),
        ),
    ],
)
def test_donated_pools_are_written_in_place(dtype: str):
    """The results are the pools, and no other array of a pool's size is made."""
    pool = pool_of(Case("deep", 3, 5, dtype=dtype), pages=4000)
    pages = jax.ShapeDtypeStruct((6, 3, 16, 64), jnp.dtype(dtype))
    run = jax.jit(scatter, donate_argnums=0)
    memory = run.lower((pool,) * 3, pages, IDS).compile().memory_analysis()
    assert memory is not None
    pool_bytes = 2 * 4000 * 16 * 64 * pool.dtype.itemsize
    assert memory.alias_size_in_bytes == 3 * pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes // 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arrays": ()}, "arrays must not be empty"),
        ({"arrays": (jnp.zeros((2, 9, 16)),)}, r"arrays\[0\] must be \[K, P, S, H\]"),
        ({"arrays": (POOL, jnp.zeros((2, 8, 16, 64)))}, r"P = 8, but arrays\[0\] has P = 9"),
        ({"arrays": (POOL, POOL.update(dtype=jnp.bfloat16))}, r"arrays\[1\] is bfloat16"),
        ({"page_ids": jnp.zeros(3, jnp.int16)}, "page_ids must be int32"),
        ({"heads": slice(0, 2, 2)}, "heads must be one or more in a row"),
        ({"heads": slice(2, 3)}, "heads must be one or more in a row"),
        ({"implementation": "fast"}, "one of reference, mosaic_gpu, not 'fast'"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str):
    given = {"arrays": (POOL,), "page_ids": IDS, **changes}
    arrays, ids = given.pop("arrays"), given.pop("page_ids")
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(partial(gather, **given), arrays, ids)


@pytest.mark.parametrize("wrong", [((3, 3, 16, 64), "float32"), ((2, 3, 16, 64), "bfloat16")])
def test_pages_must_fit(wrong: tuple[tuple[int, ...], str]):
    pages = jax.ShapeDtypeStruct(wrong[0], jnp.dtype(wrong[1]))
    with pytest.raises(ValueError, match=r"= float32\[2, 3, 16, 64\], but they are"):
        jax.eval_shape(scatter, (POOL,), pages, IDS)


@needs_jax_11
@pytest.mark.parametrize(
    ("pool", "reason"),
    [
        (((2, 9, 16, 64), "int8"), "type of 2 or 4 bytes, not int8"),
        (((2, 9, 16, 6), "float32"), "multiple of 16 bytes, not 6 of float32"),
        (((2, 9, 16, 512), "bfloat16"), "head dim must be at most 256"),
        (((2, 9, 3, 16), "bfloat16"), "multiple of 128 bytes, not 96"),
    ],
)
def test_the_kernel_refuses_with_the_reason(pool: tuple[tuple[int, ...], str], reason: str):
    array = jax.ShapeDtypeStruct(pool[0], jnp.dtype(pool[1]))
    with pytest.raises(NotImplementedError, match=f"gather by mosaic_gpu: .*{reason}"):
        jax.eval_shape(partial(gather, implementation="mosaic_gpu"), (array,), IDS)
