#!/usr/bin/env bash
# Expected: jax.random.categorical draws each token with its softmax probability, up to the rounding
# of the logits. Its documentation speaks of a bias only for float32 and for events rarer than 1e-7.
#
# Happens: noise is drawn in the dtype of the logits. In bfloat16 there are 128 different values of
# it, and the largest is 4.84. With one token at probability 0.5 and 999 tokens that share the other
# half, the one is drawn 99 times of 100, and most of the others never. mode="high" and float32
# logits are right. float16 is biased too, at 0.73.
#
# Why it matters for serving: a model that runs in bfloat16 hands bfloat16 logits to the sampler.
# Text looks sane, only far less random than its temperature says, and the long tail is unreachable.
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

import jax
import jax.numpy as jnp
import numpy as np

print("jax", jax.__version__)
logits = np.full(1000, np.log(0.5 / 999), np.float32)
logits[0] = np.log(0.5)
key = jax.random.key(0)


def draw(dtype, mode):
    drawn = np.asarray(
        jax.random.categorical(key, jnp.asarray(logits, dtype), shape=(20_000,), mode=mode)
    )
    share, distinct = float((drawn == 0).mean()), len(np.unique(drawn))
    rounded = np.asarray(jax.nn.softmax(jnp.asarray(logits, dtype).astype(jnp.float32)))
    print(f"{dtype.__name__:9} mode={mode:4}: token 0 has probability {rounded[0]:.3f},"
          f" drawn {share:.3f}; {distinct} of 1000 tokens seen in 20,000 draws")
    return share, distinct


low, few = draw(jnp.bfloat16, "low")
high, many = draw(jnp.bfloat16, "high")
half, _ = draw(jnp.float16, "low")
exact, _ = draw(jnp.float32, "low")
noise = np.asarray(jax.random.gumbel(key, (200_000,), jnp.bfloat16)).astype(np.float32)
print(f"bfloat16 Gumbel noise: {len(np.unique(noise))} different values, largest {noise.max()}")
holds = low > 0.95 and few < 300 < many and 0.45 < high < 0.55
holds = holds and 0.65 < half < 0.8 and 0.45 < exact < 0.55
print("bfloat16 logits are drawn with another distribution" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
