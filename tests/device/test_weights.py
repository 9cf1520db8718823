"""Weights on meshes: the same numbers whatever the layout, from a file or from a seed."""

from pathlib import Path

import jax
import numpy as np
import pytest

from pdjax.core.kv_layout import split_layers
from pdjax.core.model_spec import ModelSpec
from pdjax.device.checkpoints.api import ALL, Checkpoint, tensor_shapes
from pdjax.device.checkpoints.open import open_checkpoint
from pdjax.device.mesh import DECODE_RULES, PREFILL_RULES, Rules, make_mesh
from pdjax.device.models import weights
from pdjax.device.models.decoder import Params
from pdjax.device.models.weights import load_params, random_params
from pdjax.text.tokenizer import Tokenizer
from tests.helpers import tiny_models

LAYOUTS = [(1, 1), (1, 2), (2, 1), (3, 2)]


class CountingCheckpoint:
    """Counts how often every element is read."""

    def __init__(self, inner: Checkpoint) -> None:
        self._inner = inner
        self.reads: dict[str, np.ndarray] = {}

    @property
    def spec(self) -> ModelSpec:
        return self._inner.spec

    def tokenizer(self) -> Tokenizer | None:
        return self._inner.tokenizer()

    def read(self, name: str, rows: slice = ALL, cols: slice = ALL) -> np.ndarray:
        found = self._inner.read(name, rows, cols)
        counts = self.reads.setdefault(name, np.zeros_like(self._inner.read(name), np.int32))
        counts[(rows, cols)[: counts.ndim]] += 1
        return found


@pytest.fixture(params=["llama", "qwen2", "mixtral"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    return open_checkpoint(tiny_models.write(request.param, tmp_path))


def load(checkpoint: Checkpoint, stages: int, tp: int, rules: Rules = DECODE_RULES) -> Params:
    mesh = make_mesh(jax.devices()[: stages * tp], stages, tp)
    layers = split_layers(checkpoint.spec.num_layers, stages)
    return load_params(checkpoint, mesh, rules, layers, "float32")


def by_layer(params: Params, num_layers: int, stages: int) -> list[dict[str, np.ndarray]]:
    """Undo the stacking: fields of every layer, in order; the rest must be zeros."""
    layers: list[dict[str, np.ndarray]] = [{} for _ in range(num_layers)]
    runs = split_layers(num_layers, stages)
    for slot, layer in enumerate(params.layers):
        for name, stacked in layer.items():
            for stage in range(stages) if stacked is not None else ():
                part = np.split(np.asarray(stacked), stages)[stage]
                if slot < len(runs[stage]):
                    layers[runs[stage][slot]][name] = part
                else:
                    assert not part.any()
    return layers


def assert_same(one: Params, other: Params, spec: ModelSpec, stages: int) -> None:
    for a, b in zip(
        by_layer(one, spec.num_layers, 1), by_layer(other, spec.num_layers, stages), strict=True
    ):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    np.testing.assert_array_equal(one.final_norm, other.final_norm)
    for name, axis in (("unembed", 1), ("embed", 0)):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None) == (spec.tied and name == "embed")
        if a is not None:
            real, padding = np.split(np.asarray(b), [spec.vocab_size], axis=axis)
            np.testing.assert_array_equal(np.asarray(a), real)
            assert not padding.any()


@pytest.mark.parametrize(("stages", "tp"), LAYOUTS)
def test_load_is_the_same_on_every_mesh(checkpoint: Checkpoint, stages: int, tp: int):
    one = load(checkpoint, 1, 1)
    assert_same(one, load(checkpoint, stages, tp), checkpoint.spec, stages)


def test_a_shard_holds_whole_heads_in_order(checkpoint: Checkpoint):
    """Columns of `wqkv`: for each KV head its G query heads, then K, then V; the norm before them
    is multiplied into the rows."""
    spec = checkpoint.spec
    norm = checkpoint.read("model.layers.1.input_layernorm.weight")
    assert np.ptp(norm) > 0
    params = load(checkpoint, 1, 2, PREFILL_RULES)
    for head, shard in enumerate(params.layers[1]["wqkv"].addressable_shards):
        columns = np.asarray(shard.data).T.reshape(spec.group + 2, spec.head_dim, -1)
        for place, (part, first) in enumerate(
            [*(("q", head * spec.group + g) for g in range(spec.group)), ("k", head), ("v", head)]
        ):
            rows = slice(first * spec.head_dim, (first + 1) * spec.head_dim)
            name = f"model.layers.1.self_attn.{part}_proj.weight"
            np.testing.assert_array_equal(columns[place], checkpoint.read(name, rows) * norm)


def test_nothing_is_read_twice_nor_beyond_need(checkpoint: Checkpoint):
    """With layers over stages and the rest over tp, every element belongs to one place; a replica
    on another device costs no second read.
    """
    counting = CountingCheckpoint(checkpoint)
    load(counting, 2, 2)
    assert set(counting.reads) == set(tensor_shapes(checkpoint.spec))
    for name, counts in counting.reads.items():
        assert (counts == 1).all(), name


class LargestRead:
    """Remembers how much was read at once."""

    def __init__(self, inner: Checkpoint) -> None:
        self._inner = inner
        self.nbytes = 0

    @property
    def spec(self) -> ModelSpec:
        return self._inner.spec

    def tokenizer(self) -> Tokenizer | None:
        return self._inner.tokenizer()

    def read(self, name: str, rows: slice = ALL, cols: slice = ALL) -> np.ndarray:
        found = self._inner.read(name, rows, cols)
        self.nbytes = max(self.nbytes, found.nbytes)
        return found


@pytest.mark.parametrize(("stages", "tp"), LAYOUTS)
def test_weights_are_read_a_block_at_a_time(
    checkpoint: Checkpoint, stages: int, tp: int, monkeypatch: pytest.MonkeyPatch
):
    whole = load(checkpoint, 1, 1)
    monkeypatch.setattr(weights, "BLOCK_BYTES", 2048)
    reads = LargestRead(checkpoint)
    assert_same(whole, load(reads, stages, tp), checkpoint.spec, stages)
    # Q, K and V are read by whole heads, which the tiny models' blocks are smaller than.
    assert reads.nbytes <= 4 * checkpoint.spec.model_dim * 2 * checkpoint.spec.head_dim


def test_bfloat16(checkpoint: Checkpoint):
    mesh = make_mesh(jax.devices()[:2], 1, 2)
    params = load_params(checkpoint, mesh, PREFILL_RULES, split_layers(3, 1), "bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"bfloat16"}


def test_layouts_that_cannot_be(checkpoint: Checkpoint):
    with pytest.raises(ValueError, match=r"tp=3: does not divide .*kv_heads=2; allowed: \[1, 2\]"):
        load(checkpoint, 1, 3)


@pytest.mark.parametrize(("stages", "tp"), LAYOUTS)
@pytest.mark.parametrize("tied", [True, False])
def test_random_weights_do_not_depend_on_the_layout(stages: int, tp: int, tied: bool):
    spec = ModelSpec(101, 5, 32, 48, 4, 2, 8, 64, tied=tied, qkv_bias=not tied)

    def make(stages: int, tp: int, seed: int = 7) -> Params:
        mesh = make_mesh(jax.devices()[: stages * tp], stages, tp)
        layers = split_layers(spec.num_layers, stages)
        return random_params(spec, mesh, DECODE_RULES, layers, "float32", seed)

    one = make(1, 1)
    assert_same(one, make(stages, tp), spec, stages)
    other = make(1, 1, seed=8)
    first, second = (layer["wqkv"] for layer in one.layers[:2])
    assert not np.array_equal(first, other.layers[0]["wqkv"])
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(("stages", "tp"), [(1, 1), (2, 2)])
def test_copied_weights_are_those_that_are_read(checkpoint, stages, tp):
    rules = PREFILL_RULES if stages == 1 else DECODE_RULES
    read, size = load(checkpoint, stages, tp, rules), stages * tp
    mesh = make_mesh(jax.devices()[size : 2 * size], stages, tp)
    layers = split_layers(checkpoint.spec.num_layers, stages)
    copied = weights.copied_params(read, checkpoint.spec, mesh, rules, layers)
    expected = load_params(checkpoint, mesh, rules, layers, "float32")
    assert str(jax.tree.structure(copied)) == str(jax.tree.structure(expected))
    for one, other in zip(jax.tree.leaves(copied), jax.tree.leaves(expected), strict=True):
        assert one.sharding == other.sharding
        np.testing.assert_array_equal(one, other)
