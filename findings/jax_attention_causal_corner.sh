#!/usr/bin/env bash
# Expected: jax.nn.dot_product_attention(is_causal=True) with 1 query and 5 keys is a decode step:
# the query is the newest token and sees all 5 keys. FlashAttention aligns its mask so.
#
# Happens: the mask is aligned at the top left. The one query counts as position 0 and attends to
# key 0 alone. query_seq_lengths and key_value_seq_lengths do not move it. Its documentation does
# not say which corner it means.
#
# Why it matters for serving: prefill from position 0 is right, so the tests of a model pass. Decode
# and every chunk behind a cached prefix then look at the first keys only, without an error.
#
# Versions: jax 0.10.2 on Python 3.11 (implementation "xla"), the same in jax 0.11.2 on Python 3.12.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile \
    --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 ml_dtypes==0.6.0 || exit 2
cd "$folder"

JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import sys

import jax
import jax.numpy as jnp
import numpy as np

print("jax", jax.__version__)
keys = jnp.zeros((1, 5, 1, 4))
values = jnp.broadcast_to(jnp.arange(1.0, 6.0)[None, :, None, None], (1, 5, 1, 4))


def attend(queries, **options):
    out = jax.nn.dot_product_attention(
        jnp.zeros((1, queries, 1, 4)), keys, values, is_causal=True, **options
    )
    return np.asarray(out)[0, :, 0, 0].tolist()


print("values of the 5 keys: 1 2 3 4 5; every key weighs the same")
one = attend(1)
told = attend(1, query_seq_lengths=jnp.array([1]), key_value_seq_lengths=jnp.array([5]))
two = attend(2)
print("1 query, causal:", one, "(all 5 keys would give 3.0)")
print("1 query, causal, lengths 1 and 5 given:", told)
print("2 queries, causal:", two, "(bottom right would give 2.5 and 3.0)")
holds = one == [1.0] and told == [1.0] and two == [1.0, 1.5]
print("the causal mask is aligned at the top left" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
