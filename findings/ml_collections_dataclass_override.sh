#!/usr/bin/env bash
# Expected: config_flags.DEFINE_config_dataclass makes the dataclass anew from the overrides of the
# command line, as dataclasses.replace does: __post_init__ checks the values and derives others,
# and a frozen dataclass is as good as any.
#
# Happens: the default is copied and the fields of the copy are assigned, one after another. So
# __post_init__ is not run again: --config.rows=7 passes a check that refuses odd rows, and a field
# that is derived from rows keeps the default's value. A frozen dataclass is accepted where the flag
# is defined, and its first override ends with FrozenInstanceError, a traceback and no flag error.
#
# Why it matters for serving: configs of JAX systems are dataclasses that check themselves. Behind
# this flag a value that the constructor refuses reaches the model, and what was derived from the
# default (buckets, page counts) no longer fits it.
#
# Versions: ml_collections 1.1.0, absl-py 2.5.1 on Python 3.11.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check \
    ml_collections==1.1.0 absl-py==2.5.1 || exit 2
cd "$folder"

cat >overridden.py <<'PY'
import dataclasses
import sys

from absl import flags
from ml_collections import config_flags

kind, words = sys.argv[1], sys.argv[2:]
sys.argv = [sys.argv[0], *words]  # overrides are looked up there


@dataclasses.dataclass(frozen=kind == "frozen")
class Config:
    rows: int = 8
    pairs: int = dataclasses.field(init=False, default=0)

    def __post_init__(self):
        if self.rows % 2:
            raise ValueError(f"rows={self.rows}: must be even")
        object.__setattr__(self, "pairs", self.rows // 2)


holder = config_flags.DEFINE_config_dataclass("config", Config())
try:
    flags.FLAGS(sys.argv)
except Exception as error:
    print(type(error).__name__, str(error))
else:
    print(holder.value)
PY
python=$folder/venv/bin/python
"$python" -c 'import importlib.metadata as m; print("ml_collections", m.version("ml_collections"))'
odd=$("$python" overridden.py plain --config.rows=7)
even=$("$python" overridden.py plain --config.rows=4)
frozen=$("$python" overridden.py frozen --config.rows=4)
echo "rows=7, which the constructor refuses: $odd"
echo "rows=4, of which there are 2 pairs:    $even"
echo "rows=4 of a frozen dataclass:          $frozen"
if [[ $odd == "Config(rows=7, pairs=4)" && $even == "Config(rows=4, pairs=4)" &&
    $frozen == FrozenInstanceError* ]]; then
    echo "overrides are assigned, and __post_init__ is not run"
else
    echo CHANGED
    exit 1
fi
