#!/usr/bin/env bash
# Expected: a row of jax.nn.dot_product_attention that may attend to nothing (key_value_seq_lengths
# of 0, or a mask without a True) gives zeros, as FlashAttention does, or NaN, as softmax of -inf
# does.
#
# Happens: it gives the plain average of all values, also of those that its length excludes, because
# masked logits become one large finite number.
#
# Why it matters for serving: an unused row of a padded batch reads whatever lies in its pages, that
# is another request's values. The result is finite and looks like any other row, so neither a NaN
# check nor a comparison with zero notices that the row was empty.
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
query = jnp.zeros((1, 1, 1, 4))
keys = jax.random.normal(jax.random.key(0), (1, 5, 1, 4))
values = jnp.broadcast_to(jnp.arange(1.0, 6.0)[None, :, None, None], (1, 5, 1, 4))
by_length = jax.nn.dot_product_attention(
    query, keys, values, key_value_seq_lengths=jnp.array([0])
)
by_mask = jax.nn.dot_product_attention(query, keys, values, mask=jnp.zeros((1, 1, 1, 5), bool))
length, mask = (float(np.asarray(out)[0, 0, 0, 0]) for out in (by_length, by_mask))
print("values of the 5 keys: 1 2 3 4 5")
print("row of length 0:", length, "| row with everything masked:", mask)
softmax = np.asarray(jax.nn.softmax(jnp.ones(3), where=jnp.zeros(3, bool))).tolist()
print("jax.nn.softmax(where=nothing), of the same library:", softmax)
holds = abs(length - 3) < 1e-6 and abs(mask - 3) < 1e-6 and softmax == [0, 0, 0]
print("a row without keys averages all values" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
