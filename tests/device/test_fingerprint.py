"""Fingerprints of models."""

from dataclasses import replace

import jax.numpy as jnp

from pdjax.core.model_spec import RopeSpec
from pdjax.device.kept import key
from pdjax.device.models.fingerprint import fingerprint
from tests.helpers.promise import SPEC


def test_a_fingerprint_follows_from_what_kv_follows_from(monkeypatch):
    params = {"w": jnp.arange(6.0).reshape(2, 3), "norm": jnp.ones(3, jnp.bfloat16)}
    mine = fingerprint(params, SPEC, "float32")
    assert len(mine) == 16 and fingerprint(dict(params), SPEC, "float32") == mine
    others = [
        fingerprint(params | {"w": params["w"].at[1, 2].set(7)}, SPEC, "float32"),
        fingerprint(params | {"w": params["w"][::-1]}, SPEC, "float32"),
        fingerprint(params, replace(SPEC, rope=RopeSpec(theta=9.0)), "float32"),
        fingerprint(params, SPEC, "bfloat16"),
    ]
    monkeypatch.setattr(key, "_IMPORTED", [])
    others += [fingerprint(params, SPEC, "float32") for _ in range(2)]
    assert len({mine, *others}) == 7
