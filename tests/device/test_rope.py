"""RoPE frequencies: published properties of every kind of stretching."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from pdjax.core.model_spec import RopeSpec
from pdjax.device.models.attention import rope_table
from pdjax.device.models.forms import rotary_order


def test_plain():
    frequencies, scale = RopeSpec(theta=100.0).frequencies(8)
    np.testing.assert_allclose(frequencies, [1, 100**-0.25, 0.1, 100**-0.75])
    assert scale == 1.0


def test_none_rotates_nothing():
    cos, sin = rope_table(RopeSpec(kind="none"), 8, jnp.arange(5000, 5003))
    assert cos.shape == sin.shape == (3, 4)
    assert (cos == 1).all() and (sin == 0).all()


def test_linear_is_positions_divided():
    plain, _ = RopeSpec().frequencies(64)
    stretched, scale = RopeSpec(kind="linear", factor=4.0).frequencies(64)
    np.testing.assert_allclose(stretched * 4, plain)
    assert scale == 1.0


def test_llama3_keeps_short_waves_and_stretches_long_ones():
    """Llama 3.1: factor 8, band from 1 to 4 rotations over 8,192 tokens."""
    plain, _ = RopeSpec(theta=500000.0).frequencies(128)
    rope = RopeSpec(theta=500000.0, kind="llama3", factor=8.0, original_context=8192)
    stretched, scale = rope.frequencies(128)
    wavelength = 2 * math.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    np.testing.assert_allclose(stretched[short], plain[short])
    np.testing.assert_allclose(stretched[long], plain[long] / 8)
    band = ~short & ~long
    assert band.any()
    assert (stretched[band] < plain[band]).all()
    assert (stretched[band] > plain[band] / 8).all()
    assert scale == 1.0


def test_yarn_keeps_short_waves_and_stretches_long_ones():
    plain, _ = RopeSpec(theta=10000.0).frequencies(128)
    rope = RopeSpec(theta=10000.0, kind="yarn", factor=16.0, original_context=4096)
    stretched, scale = rope.frequencies(128)
    rotations = 4096 * plain / (2 * math.pi)
    often, seldom = rotations > 2 * rope.beta_fast, rotations < rope.beta_slow / 2
    np.testing.assert_allclose(stretched[often], plain[often])
    np.testing.assert_allclose(stretched[seldom], plain[seldom] / 16)
    assert (np.diff(stretched) < 0).all()
    assert scale == pytest.approx(0.1 * math.log(16) + 1)


def test_yarn_scale_may_be_given():
    rope = RopeSpec(kind="yarn", factor=4.0, original_context=64, attention_factor=1.5)
    assert rope.frequencies(16)[1] == 1.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": ["x" * 9999]}, r"^rope\.kind=.{0,200}: allowed are plain"),
        ({"kind": "yarn", "theta": 1, "original_context": 8}, r"rope\.theta=1: yarn needs another"),
        ({"factor": float("nan")}, r"rope\.factor=nan: must be positive"),
        ({"theta": True}, r"rope\.theta=True: must be a positive number"),
        ({"original_context": 2**40}, r"rope\.original_context=1099511627776: must be"),
        ({"beta_fast": 5e-324}, r"rope\.beta_fast=5e-324: must be positive, 1e-30 to"),
        ({"factor": 1e-31}, r"rope\.factor=1e-31: must be positive, 1e-30 to 1e\+30"),
        ({"truncate": 1}, r"rope\.truncate=1: must be true or false"),
        ({"kind": "dynamic"}, r"rope\.kind='dynamic'.*allowed.*plain"),
        ({"kind": "linear", "factor": 0.0}, r"rope\.factor=0\.0"),
        ({"kind": "yarn", "factor": 2.0}, r"rope\.original_context=0"),
    ],
)
def test_refusals(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        RopeSpec(**fields)


def test_longrope_has_one_set_of_divisors_for_a_deployment():
    rope = RopeSpec(
        kind="longrope",
        factor=4.0,
        original_context=32,
        divisors=(2.0, 4.0),
        short_divisors=(1.0, 2.0),
    )
    plain, _ = RopeSpec().frequencies(4)
    for context, divisors in ((32, (1.0, 2.0)), (33, (2.0, 4.0))):
        frequencies, scale = rope.within(context).frequencies(4)
        np.testing.assert_allclose(frequencies, plain / np.array(divisors))
        assert scale == pytest.approx((1 + np.log(4) / np.log(32)) ** 0.5)
    assert rope.within(32).within(64) == rope.within(32)
    with pytest.raises(ValueError, match=r"rope\.divisors: 2 numbers; longrope needs 4"):
        rope.frequencies(8)


@pytest.mark.parametrize(
    ("dims", "neighbours"), [(None, True), (4, False), (4, True), (None, False)]
)
def test_scores_do_not_change_with_the_order_of_rows(dims: int | None, neighbours: bool):
    """Heads in a checkpoint's order, rotated as it says, have the scores of reordered heads whose
    halves are rotated."""
    rope = RopeSpec(rotary_dim=dims)
    rotated = dims or 8
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 8)).astype(np.float32)
    order = list(rotary_order(8, dims, neighbours)) or list(range(8))
    angles = [rope_table(rope, 8, jnp.array([position])) for position in (5, 3)]
    whole = 0.0
    halves = []
    for x, (cos, sin) in zip((q, k), angles, strict=True):
        a, b = np.split(x[order], 2)
        halves.append(np.concatenate([a * cos[0] - b * sin[0], b * cos[0] + a * sin[0]]))
    frequencies, _ = rope.frequencies(8)
    for pair, frequency in enumerate(frequencies):
        rows = (2 * pair, 2 * pair + 1) if neighbours else (pair, pair + rotated // 2)
        turned = [
            complex(x[rows[0]], x[rows[1]]) * np.exp(1j * frequency * p)
            for x, p in ((q, 5), (k, 3))
        ]
        whole += (turned[0] * np.conj(turned[1])).real
    whole += float(q[rotated:] @ k[rotated:])
    assert float(halves[0] @ halves[1]) == pytest.approx(whole, rel=1e-4)
