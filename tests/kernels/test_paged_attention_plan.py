"""A launch of decode attention on Hopper GPUs is cut by its shapes alone."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import mosaic_gpu_plan
from pallas_kernels.paged_attention.cases import Case, make_inputs
from pallas_kernels.paged_attention.mosaic_gpu_plan import ByLength, Plan
from pallas_kernels.paged_attention.mosaic_gpu_work import cut

SMALL = Case("any", (1,) * 4, 8, 4, 128, 64, "bfloat16")


@pytest.mark.parametrize(
    ("rows", "tokens", "window", "parts"),
    [
        (64, 1088, None, 1),  # no row can be long
        (64, 4096, None, 1),
        (128, 8256, 1000, 1),  # nor can a window see a long row
        (64, 8256, None, ByLength(64, 32)),
        (128, 8256, 4096, ByLength(64, 32)),
        (64, 131072, None, ByLength(64, 128)),
        (16, 8256, None, ByLength(64, 32)),
        (1, 1088, None, 9),  # fewer pieces than processors
        (8, 8256, None, 2),
    ],
)
def test_gpu_kernel_chooses_how_to_cut(
    rows: int, tokens: int, window: int | None, parts: int | ByLength
):
    assert mosaic_gpu_plan.choose_parts(rows * 8, tokens, window, 132) == parts


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"kv_dtype": "int8", "head_dim": 256},
        {"kv_dtype": "int8", "group": 64, "kv_lens": (1,) * 64},
    ],
    ids=["bfloat16", "head dim 256", "many queries"],
)
def test_gpu_kernel_has_one_reader(change: dict[str, Any]):
    case = replace(SMALL, **change)
    assert plan_of(case, 1088).readers == 1
    with pytest.raises(ValueError, match="readers=2: must be 1, or over quantised pages 2"):
        plan_of(case, 1088, readers=2)


@pytest.mark.parametrize("tokens", [1088, 8192])
def test_gpu_kernel_has_two_readers_of_quantised_pages(tokens: int):
    assert plan_of(replace(SMALL, kv_dtype="int8"), tokens).readers == 2


def plan_of(case: Case, tokens: int, **chosen: Any) -> Plan:
    """Make the plan of a launch with a page table for `tokens` tokens a row."""
    queries = (len(case.kv_lens), case.kv_heads, case.group, case.head_dim)
    pages: Any = make_inputs(replace(case, kv_lens=(1,)), seed=0).k_pages
    return mosaic_gpu_plan.make_plan(
        jnp.zeros(queries),
        pages,
        jnp.zeros((len(case.kv_lens), tokens // case.page_size), jnp.int32),
        append=False,
        scale=1.0,
        logit_soft_cap=None,
        sliding_window=None,
        **chosen,
    )


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("window", [None, 260])
def test_gpu_kernel_lists_every_part_once(window: int | None, append: bool):
    """The list has the parts of most blocks first, and ends with their number."""
    lens = np.array([70, 1, 0, 700, 64, 65, 129, 704, 300, 257], np.int32)
    plan = Plan(
        len(lens), 2, 4, 64, 44, 16, 6, ByLength(4, 2), 3, 1, append, False, 1.0, None, window
    )
    last = np.maximum(lens - 1, 0) if append else lens
    first = np.maximum(lens - (window or 10_000), 0) // 64
    blocks = np.maximum(-(-last // 64) - first, 0)
    expected = np.where(blocks <= 4, 1, -(-blocks // 2))
    entries, parts = (np.asarray(x) for x in jax.jit(partial(cut, plan))(lens))
    np.testing.assert_array_equal(parts, expected)
    assert entries[-1] == expected.sum()
    listed = entries[: expected.sum()]
    wanted = [6 * row + part for row, count in enumerate(expected) for part in range(count)]
    assert sorted(listed) == wanted
    sizes = -(-blocks // expected)[listed // 6]
    assert (np.diff(sizes) <= 0).all()
