#!/usr/bin/env bash
# Expected: jnp.sum accumulates narrow types in a wide one: bfloat16 in float32, int8 in int32. So
# do float8 in float32 and int4 in int32.
#
# Happens: float8 is accumulated in float8. 100 ones of float8_e4m3fn sum to 64, and their mean is
# 0.6875; the mean of 1,000 ones is NaN, because 1,000 is above the largest float8_e4m3fn. The sum
# of int4, uint4 and int2 raises ValueError "Invalid integer data type 'V'", while their cumsum and
# dot work. dtype=jnp.float32 or jnp.int32 mends all of them.
#
# Why it matters for serving: sums and means over fp8 weights or pages serve as scales, checksums
# and calibration statistics, and a small test with ten e4m3fn numbers is exact.
#
# Versions: jax 0.10.2, ml_dtypes 0.6.0 on Python 3.11; the same in jax 0.11.2 on Python 3.12.
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

print("jax", jax.__version__)
seen = {}
for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
    for count in (10, 100, 1000):
        ones = jnp.ones(count, name)
        seen[name, count] = float(ones.sum()), float(ones.mean())
        wide = float(ones.sum(dtype=jnp.float32))
        print(f"{count:4} ones of {name:13}: sum {seen[name, count][0]}, mean"
              f" {seen[name, count][1]}; sum in float32 {wide}")
try:
    fours = str(jnp.ones(3, jnp.int4).sum())
except ValueError as error:
    fours = f"ValueError: {error}"
print("3 ones of int8: sum", jnp.ones(3, jnp.int8).sum(), "| 3 ones of int4: sum", fours)
print("3 ones of int4: cumsum", jnp.cumsum(jnp.ones(3, jnp.int4)))
holds = seen["bfloat16", 1000] == (1000, 1) and seen["float8_e4m3fn", 10] == (10, 1)
holds = holds and seen["float8_e4m3fn", 100][0] < 70 and seen["float8_e5m2", 100][0] < 40
holds = holds and seen["float8_e4m3fn", 1000][1] != seen["float8_e4m3fn", 1000][1]
holds = holds and fours.startswith("ValueError")
print("sums of float8 stay in float8, and int4 has none" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
