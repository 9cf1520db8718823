"""The mixed step as a Hopper GPU would be given it, lowered without one."""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from experiments.bench_steps.batches import mixed_batches
from experiments.bench_steps.cases import MixedCase
from experiments.common.shapes import MODELS
from pdjax.device.mesh import PREFILL_RULES, STAGE, TP, make_mesh
from pdjax.device.models.registry import family_of, kv_layout
from pdjax.device.models.weights import random_params
from pdjax.device.packing import ALIGNMENT
from pdjax.device.sharing import Specs
from pdjax.device.steps import decode, mixed, prefill
from pdjax.device.steps.sample import Undecided

H200 = AbstractDevice("NVIDIA H200", None, platform="gpu")
MESH = AbstractMesh((1, 1), (STAGE, TP), axis_types=(AxisType.Auto,) * 2, abstract_device=H200)
SPEC = replace(
    MODELS["llama_1b"], num_layers=2, model_dim=512, mlp_dim=1024, query_heads=8, kv_heads=2
)

WIDTH = {"f32": 4, "i32": 4, "bf16": 2}


def lowered(case: str) -> str:
    """The mixed step of a case, for CUDA."""
    spec = SPEC
    steps, _, pages = mixed_batches(MixedCase.parse(case), 1, 64, spec.vocab_size)
    layout = kv_layout(spec, 64, "bfloat16")
    one = make_mesh(jax.devices()[:1], 1, 1)
    params = jax.eval_shape(
        lambda: random_params(spec, one, PREFILL_RULES, layout.stage_layers, "bfloat16")
    )
    leaves, tree = jax.tree.flatten(params)
    specs = Specs((PartitionSpec(),) * len(leaves), tree)
    with mock.patch.object(mixed, "KeptProgram", lambda _name, jitted, *_: jitted):
        facts: Any = specs, family_of(spec), spec, layout, None
        step = mixed._make.__wrapped__(MESH, *facts)  # type: ignore[attr-defined]
    n = len(steps[0].rows.tokens)
    pool = jax.ShapeDtypeStruct((spec.kv_heads, pages, 64, spec.head_dim), jnp.bfloat16)
    arguments = (
        params,
        [(pool, pool)] * spec.num_layers,
        Undecided.shapes(n, spec.vocab_size),
        jax.ShapeDtypeStruct((n,), jnp.int32),
        prefill.pack(steps[0].chunks),
        decode.pack(steps[0].rows),
    )
    return step.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def function(text: str, name: str) -> str:
    """A function of a lowered program."""
    [body] = [each for each in text.split("func.func ")[1:] if f"@{name}(" in each.split("\n")[0]]
    return body


def test_a_mixed_step_for_a_hopper_gpu():
    """Of so many prompt tokens that what the rows have begins nowhere where a kernel may begin."""
    text = lowered("64x200/1x101")
    layer = function(text, "one")  # all layers call it
    weights = "512x768xbf16>", "512x512xbf16>", "512x2048xbf16>", "1024x512xbf16>"
    products = [line for line in layer.splitlines() if "dot_general" in line]
    assert all(weight in line for weight, line in zip(weights, products, strict=True)), (
        "each weight is read once, for chunks and rows"
    )
    # append_attention, rope_and_write, prefill_attention, add_rms
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 4
    assert re.findall(r"@_append\(|optimization_barrier|@_launch", layer) == [
        *("@_append(", "optimization_barrier", "@_launch", "@_launch")
    ], "the rows' attention has written and read before the chunks' does"
    parts = list(parts_given(layer))
    assert 101 in [start for start, _ in parts]
    assert all(start * row % (4 * ALIGNMENT) == 0 for start, row in parts)


@pytest.mark.parametrize(("count", "operations"), [(64, ["slice"]), (65, ["slice", "jit"])])
def test_only_parts_that_begin_anywhere_are_copied(count: int, operations: list[str]):
    x, taken = np.arange(count + 3, dtype=np.float32), np.array([True, False, True])
    made = jax.make_jaxpr(partial(mixed._behind, count=count))(x, taken=taken)
    names = [each.primitive.name for each in made.jaxpr.eqns]
    assert [name for name in names if name in ("slice", "jit")] == operations  # jit: of jnp.where
    behind = np.asarray(mixed._behind(jnp.asarray(x), count, jnp.asarray(taken)))
    assert behind[taken].tolist() == [count, count + 2]


def parts_given(body: str) -> Iterator[tuple[int, int]]:
    """The slices that kernels get as operands: where each begins, and the bytes of a row."""
    made: dict[str, str] = {}
    for line in body.splitlines():
        if call := re.search(r"call @_(?:append|launch)\w*\(([^)]*)\)", line):
            yield from filter(None, (_part(operand, made) for operand in call[1].split(", ")))
        elif found := re.match(r"\s*(%\w+) = (stablehlo\..*)", line):
            made[found[1]] = found[2]


def _part(operand: str, made: dict[str, str]) -> tuple[int, int] | None:
    line = made.get(operand, "")
    while found := re.match(r"stablehlo\.reshape (%\w+)", line):
        line = made.get(found[1], "")
    found = re.match(r"stablehlo\.slice .*? \[(\d+):.*-> tensor<\d+((?:x\d+)*)x(\w+)>", line)
    if found is None:
        return None
    return int(found[1]), prod(map(int, found[2].split("x")[1:])) * WIDTH[found[3]]
