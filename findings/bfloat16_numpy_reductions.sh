#!/usr/bin/env bash
# Expected: np.mean of a thousand bfloat16 ones is 1. numpy computes the mean of float16 in float32,
# and its sum pairwise.
#
# Happens: for the types of ml_dtypes numpy adds one element after another in the type itself. The
# sum of bfloat16 ones stops at 256, so the mean of 1,000 ones is 0.256, their standard deviation is
# 0.5, and the float8_e4m3fn sum of 100 ones is 16. `@` is right, and dtype=np.float32 mends the
# rest.
#
# Why it matters for serving: bfloat16 tensors read with safetensors or taken from jax with
# np.asarray are such arrays. A mean, a norm check or a calibration statistic over them is wrong by
# any factor, silently; jnp.mean of the same array is right.
#
# Versions: ml_dtypes 0.6.0, numpy 2.4.6 on Python 3.11; the same with numpy 2.5.5 on Python 3.12.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile \
    --disable-pip-version-check numpy==2.4.6 ml_dtypes==0.6.0 || exit 2
cd "$folder"

"$folder/venv/bin/python" - <<'PY'
import sys

import ml_dtypes
import numpy as np

print("ml_dtypes", ml_dtypes.__version__, "numpy", np.__version__)
ones = np.ones(1000, ml_dtypes.bfloat16)
eights = np.ones(100, ml_dtypes.float8_e4m3fn)
halves = np.ones(1000, np.float16)
print("float16:  mean", halves.mean(), "std", halves.std(), "sum", halves.sum())
print("bfloat16: mean", ones.mean(), "std", ones.std(), "sum", ones.sum(), "of 1000 ones")
print("bfloat16: mean with dtype=float32", ones.mean(dtype=np.float32), "| ones @ ones", ones @ ones)
print("float8_e4m3fn: sum", eights.sum(), "of 100 ones")
weights = np.full(4096, 0.1, ml_dtypes.bfloat16)
print("bfloat16: mean", weights.mean(), "of 4096 times 0.1")
holds = float(ones.sum()) == 256 and float(ones.mean()) < 0.26 and float(eights.sum()) == 16
holds = holds and float(halves.mean()) == 1 and float(ones.mean(dtype=np.float32)) == 1
holds = holds and float(ones @ ones) == 1000
print("reductions accumulate in the narrow type" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
