#!/usr/bin/env bash
# Expected: np.sort puts NaN behind all numbers and sorts the numbers, as its documentation says of
# floating types and as it does for float16 and float32.
#
# Happens: for ml_dtypes.bfloat16 (and float8) NaN compares as neither smaller nor larger, so each
# NaN stays somewhere in the middle and cuts the array into pieces: the numbers around it are left
# out of order. argsort, median and percentile inherit it. jnp.sort of the same array is right.
#
# Why it matters for serving: thresholds, top-k by argsort and percentiles of bfloat16 logits or
# weights on the host are wrong as soon as one value is NaN, not only for that value.
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
values = np.random.default_rng(0).normal(size=200)
values[::23] = np.nan
seen = {}
for dtype in (np.float16, ml_dtypes.bfloat16):
    ordered = np.sort(values.astype(dtype)).astype(np.float32)
    bad = np.isnan(ordered)
    falls = int((np.diff(ordered[~bad]) < 0).sum())
    last = bool(bad[-bad.sum() :].all())
    seen[dtype.__name__] = falls, last
    print(f"{dtype.__name__:9} NaN at {np.flatnonzero(bad).tolist()} of 200;"
          f" {falls} neighbouring numbers out of order")
small = np.sort(np.array([1, np.nan, 3, 2], ml_dtypes.bfloat16))
print("np.sort of bfloat16 [1, nan, 3, 2] =", small)
holds = seen["float16"] == (0, True) and seen["bfloat16"][0] > 0 and not seen["bfloat16"][1]
print("one NaN leaves a bfloat16 array unsorted" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
