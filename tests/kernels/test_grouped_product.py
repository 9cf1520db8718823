"""grouped_product: every implementation against plain numpy, and the promises of its interface."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.errors import LIMITS, grouped_error
from pallas_kernels.grouped_product.api import IMPLEMENTATIONS, grouped_product
from pallas_kernels.grouped_product.cases import CASES, Case, make_inputs


def name_of(case: Case) -> str:
    return case.name.replace(" ", "_")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_products(case: Case, implementation: str):
    inputs = make_inputs(case, seed=1)
    out = jax.jit(partial(grouped_product, implementation=implementation))(*inputs.operands)
    assert out.dtype == inputs.x.dtype
    assert grouped_error(inputs, np.asarray(out)) <= LIMITS[case.dtype]


@pytest.mark.parametrize(
    ("platform", "columns", "loops"),
    [
        ("cpu", 16, False),
        ("cpu", 1 << 11, True),
        ("cuda", 1 << 11, False),
        ("cuda", 1 << 26, True),
        ("tpu", 1 << 26, False),
    ],
)
def test_few_numbers_take_one_product_and_many_a_loop(platform: str, columns: int, loops: bool):
    shapes = [jax.ShapeDtypeStruct(each, jnp.float32) for each in ((4, columns), (2, columns, 8))]
    operands = *shapes, jax.ShapeDtypeStruct((2,), jnp.int32)
    traced = jax.jit(grouped_product).trace(*operands)
    assert ("while" in traced.lower(lowering_platforms=(platform,)).as_text()) == loops


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.zeros((2, 9))}, "A = 8, but x has A = 9"),
        ({"sizes": jnp.zeros(4, jnp.int32)}, "sizes .* has E = 4, but w has E = 3"),
        ({"sizes": jnp.zeros(3)}, "sizes must be int32"),
        ({"w": jnp.zeros((3, 8, 4), jnp.bfloat16)}, "w is bfloat16, but x is float32"),
        ({"x": jnp.zeros((2, 8), jnp.int32)}, "x must be of a floating type"),
        ({"implementation": "fast"}, "one of reference, tiles, not 'fast'"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str):
    good = {"x": jnp.zeros((2, 8)), "w": jnp.zeros((3, 8, 4)), "sizes": jnp.zeros(3, jnp.int32)}
    with pytest.raises(ValueError, match=message):
        grouped_product(**{**good, **changes})
