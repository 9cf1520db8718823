#!/usr/bin/env bash
# Expected: a CheckpointManager with best_fn and max_to_keep keeps the best checkpoints. One whose
# metric is NaN counts as the worst, or is refused.
#
# Happens: NaN compares as neither better nor worse, which spoils the ranking of all others. After
# accuracies 0.9, NaN, 0.1, 0.2 with max_to_keep=2 the manager holds 0.1 and 0.2, says that 0.2 is
# the best, and has deleted 0.9 from the disk.
#
# Why it matters for serving: the checkpoint that is served is the one best_step names. A single
# evaluation over an empty or overflowing batch costs the best weights, without an error or a
# warning.
#
# Versions: orbax-checkpoint 0.12.8, jax 0.10.2, numpy 2.4.6 on Python 3.11.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile \
    --disable-pip-version-check orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 ml_dtypes==0.6.0 || exit 2
cd "$folder"

JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import logging
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

logging.disable(logging.WARNING)
print("orbax-checkpoint", version("orbax-checkpoint"))
nan = float("nan")
seen = []
for number, accuracies in enumerate(([0.9, 0.0, 0.1, 0.2], [0.9, nan, 0.1, 0.2])):
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, best_fn=lambda metrics: metrics["accuracy"]
    )
    with ocp.CheckpointManager(Path.cwd() / str(number), options=options) as manager:
        for step, accuracy in enumerate(accuracies):
            state = {"w": np.full(2, step, np.float32)}
            manager.save(
                step, args=ocp.args.StandardSave(state), metrics={"accuracy": accuracy}
            )
        manager.wait_until_finished()
        seen.append((manager.best_step(), manager.all_steps()))
    kept = [accuracies[step] for step in seen[-1][1]]
    print(f"accuracies {accuracies}, max_to_keep=2: kept {kept}, best {accuracies[seen[-1][0]]}")
holds = seen == [(0, [0, 3]), (3, [2, 3])]
print("a NaN metric makes the best checkpoint go" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
