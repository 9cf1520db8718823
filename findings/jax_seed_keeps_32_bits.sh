#!/usr/bin/env bash
# Expected: jax.random.key(seed) takes "a 64- or 32-bit integer" (its documentation), so two seeds
# that differ in their upper 32 bits start two different streams, or are refused.
#
# Happens: without jax_enable_x64 the upper 32 bits are dropped without a warning. The seeds 5,
# 2**32 + 5 and 2**40 + 5 make one key, and so do -1, 2**32 - 1 and 2**63 - 1.
#
# Why it matters for serving: the OpenAI protocol's `seed` is a 64-bit integer, and clients put
# hashes and nanoseconds there. Requests that were meant to differ answer with the same samples.
#
# Versions: jax 0.10.2 on Python 3.11, the same in jax 0.11.2 on Python 3.12.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile \
    --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 ml_dtypes==0.6.0 || exit 2
cd "$folder"

JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import sys
import warnings

import jax
import numpy as np

warnings.simplefilter("error")
print("jax", jax.__version__)


def words(seed):
    return np.asarray(jax.random.key_data(jax.random.key(seed))).tolist()


groups = [[5, 2**32 + 5, 2**40 + 5], [-1, 2**32 - 1, 2**63 - 1]]
for group in groups:
    for seed in group:
        print(f"key({seed}) holds {words(seed)}")
kept = all(words(seed) == words(group[0]) for group in groups for seed in group)
differ = words(5) != words(6)
print("64-bit seeds are cut to 32 bits, silently" if kept else "CHANGED: 64-bit seeds differ")
sys.exit(0 if kept and differ else 1)
PY
