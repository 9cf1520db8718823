"""Every variant of a Hugging Face directory has the same meaning as in transformers."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from pdjax.core.kv_layout import split_layers
from pdjax.device.checkpoints.hf_config import read_spec
from pdjax.device.checkpoints.open import open_checkpoint
from pdjax.device.mesh import PREFILL_RULES, make_mesh
from pdjax.device.models.weights import load_params
from tests.helpers import tiny_models
from tests.helpers.dense import dense_logits
from tests.parity.config_kinds import MODELS, ROPES, write_config, write_model

FIXTURES = Path(__file__).parent / "fixtures"
TOLERANCE = 1e-3


@pytest.mark.parametrize("kind", ROPES)
def test_rope(kind: str, tmp_path: Path):
    """Frequencies and scale equal those of transformers; configurations that it refuses are
    refused."""
    expected = json.loads((FIXTURES / "config_ropes.json").read_text())["ropes"][kind]
    directory = write_config(tmp_path, ROPES[kind])
    if expected is None:
        with pytest.raises(ValueError, match=r"config\.json: .*; allowed: "):
            read_spec(directory)
        return
    spec = read_spec(directory)
    frequencies, scale = spec.rope.frequencies(spec.head_dim)
    np.testing.assert_allclose(frequencies, expected["frequencies"], rtol=1e-5)
    assert scale == pytest.approx(expected["scale"], rel=1e-9)


@pytest.mark.parametrize("kind", MODELS)
def test_logits(kind: str, tmp_path: Path):
    with np.load(FIXTURES / "config_logits.npz") as file:
        expected = file[kind]
    name = write_model(kind, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    mesh = make_mesh(jax.devices()[:1], stages=1, tp=1)
    layers = split_layers(checkpoint.spec.num_layers, 1)
    params = load_params(checkpoint, mesh, PREFILL_RULES, layers, "float32")
    logits = dense_logits(params, tiny_models.tokens(name), spec=checkpoint.spec)[-1]
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)
