"""The network's arithmetic, where its types differ from its operands'."""

import jax.numpy as jnp
import numpy as np

from pdjax.core.model_spec import ModelSpec
from pdjax.device.models.decoder import Params, unembed


def test_logits_of_bfloat16_are_float32_from_the_product():
    rng = np.random.default_rng(0)
    spec = ModelSpec(50, 1, 64, 32, 2, 1, 8, 16)
    matrix = jnp.asarray(rng.standard_normal((64, 52)), jnp.bfloat16)  # V padded
    params = Params(layers=[], final_norm=jnp.ones(64, jnp.bfloat16), unembed=matrix, embed=None)
    x = jnp.asarray(rng.standard_normal((3, 64)), jnp.bfloat16)
    logits = unembed(params, x, spec=spec)
    assert (logits.dtype, logits.shape) == (jnp.float32, (3, 50))
    wide = np.asarray(x, np.float32)
    normed = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + spec.norm_eps)
    normed = np.asarray(jnp.asarray(normed, jnp.bfloat16), np.float32)
    expected = normed @ np.asarray(matrix, np.float32)[:, :50]
    rounded = np.asarray(jnp.asarray(expected, jnp.bfloat16), np.float32)
    assert np.abs(rounded - expected).max() > 1e-2  # what a bfloat16 copy would lose
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_a_row_too_large_to_be_scaled_has_no_logits():
    """Its squares overflow: a scale of 0 would make logits of 0, and answers of token 0."""
    spec = ModelSpec(5, 1, 8, 32, 2, 1, 8, 16)
    rng = np.random.default_rng(1)
    params = Params([], jnp.ones(8), jnp.asarray(rng.standard_normal((8, 5)), jnp.float32), None)
    x = jnp.stack([jnp.full(8, 1e25), jnp.ones(8), jnp.full(8, 1e15), jnp.zeros(8)])
    logits = np.asarray(unembed(params, x, spec=spec))
    assert np.isnan(logits[0]).all()
    assert np.isfinite(logits[1:]).all()
    np.testing.assert_allclose(logits[2], logits[1], rtol=1e-4)
