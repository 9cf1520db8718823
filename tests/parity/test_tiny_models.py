"""Logits of every supported architecture compared with transformers, on random weights."""

from pathlib import Path

import jax
import numpy as np
import pytest

from pdjax.core.kv_layout import split_layers
from pdjax.device.checkpoints.open import open_checkpoint
from pdjax.device.mesh import DECODE_RULES, PREFILL_RULES, WHOLE_EXPERTS, make_mesh
from pdjax.device.models.weights import load_params
from tests.helpers import tiny_models
from tests.helpers.dense import dense_logits, staged_logits

TOLERANCE = 1e-3
NAMES = list(tiny_models.TINY_MODELS)
STAGED = [*NAMES[: NAMES.index("mistral_window")], "qwen2_moe"]
"""The others are staged in `tests/e2e/test_families.py`."""


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "fixtures" / "tiny_logits.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", NAMES)
def test_one_device(name: str, tmp_path: Path, expected: dict[str, np.ndarray]):
    checkpoint = open_checkpoint(tiny_models.write(name, tmp_path))
    layers = split_layers(checkpoint.spec.num_layers, 1)
    mesh = make_mesh(jax.devices()[:1], stages=1, tp=1)
    params = load_params(checkpoint, mesh, PREFILL_RULES, layers, "float32")
    spec = checkpoint.spec.within(tiny_models.LENGTH)
    logits = dense_logits(params, tiny_models.tokens(name), spec=spec)
    assert np.abs(expected[name]).max() > 1  # a fixture of zeros would prove nothing
    np.testing.assert_allclose(logits, expected[name], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", STAGED)
def test_two_stages_of_two_shards(name: str, tmp_path: Path, expected: dict[str, np.ndarray]):
    """Three layers are on two stages: the second stage pads with a layer of zeros. Experts lie
    whole on the shards; in `tests/e2e/test_families.py` those of a decode stage are not sharded."""
    checkpoint = open_checkpoint(tiny_models.write(name, tmp_path))
    layers = split_layers(checkpoint.spec.num_layers, 2)
    mesh = make_mesh(jax.devices()[:4], stages=2, tp=2)
    params = load_params(checkpoint, mesh, {**DECODE_RULES, **WHOLE_EXPERTS}, layers, "float32")
    spec = checkpoint.spec.within(tiny_models.LENGTH)
    logits = staged_logits(params, tiny_models.tokens(name), spec=spec, mesh=mesh)
    np.testing.assert_allclose(logits, expected[name], rtol=0, atol=TOLERANCE)
