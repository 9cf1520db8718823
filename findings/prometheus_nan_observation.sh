#!/usr/bin/env bash
# Expected: Histogram.observe(NaN) is refused, ignored, or counted above every bound, so that _count
# and _sum speak of the same observations.
#
# Happens: prometheus_client adds NaN to _sum, where it stays for the life of the process, and
# counts it nowhere: no bucket, no _count. A Summary counts it. Counter.inc(NaN) passes the check
# that refuses negative numbers, and the counter is NaN from then on.
#
# Why it matters for serving: a time divided by zero tokens, once, makes every average
# rate(sum)/rate(count) of a latency NaN until the server restarts, while quantiles look healthy and
# the count does not show that anything was observed.
#
# Versions: prometheus_client 0.26.0 on Python 3.11.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile \
    --disable-pip-version-check prometheus_client==0.26.0 || exit 2
cd "$folder"

"$folder/venv/bin/python" - <<'PY'
import math
import sys
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary

print("prometheus_client", version("prometheus_client"))
registry = CollectorRegistry()
histogram = Histogram("wait_seconds", "Wait", buckets=(1, 2), registry=registry)
summary = Summary("size", "Size", registry=registry)
counter = Counter("tokens", "Tokens", registry=registry)
for value in (0.5, math.nan, 1.5):
    histogram.observe(value)
    summary.observe(value)
    counter.inc(value)
get = registry.get_sample_value
samples = {
    name: get(name) for name in (
        "wait_seconds_count", "wait_seconds_sum", "size_count", "size_sum", "tokens_total",
    )
}
samples['wait_seconds_bucket{le="+Inf"}'] = get("wait_seconds_bucket", {"le": "+Inf"})
print("observed, and added to a counter: 0.5, NaN, 1.5")
for name, value in samples.items():
    print(f"{name} {value}")
holds = [str(value) for value in samples.values()] == ["2.0", "nan", "3.0", "nan", "nan", "2.0"]
print("NaN is in the sum for ever and in no count" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
