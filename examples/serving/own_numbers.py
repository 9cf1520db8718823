"""Run a load generator, then print what the server itself has measured meanwhile.

    python examples/serving/own_numbers.py http://127.0.0.1:8000 aiperf profile ...

The means are of the whole run, from the sums and counts of `/metrics`; so other clients of the same
server count, too. Latencies are the engines', without HTTP and the client.
"""

import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter

SHOWN = {
    "time_to_first_token_seconds": "TTFT, mean, ms",
    "inter_token_latency_seconds": "ITL, mean, ms",
    "request_time_per_output_token_seconds": "TPOT, mean of requests, ms",
    "e2e_request_latency_seconds": "latency of a request, mean, ms",
}
"""Histograms of the server, and how they are called here."""


def metrics(url: str) -> Counter[str]:
    """Sums, counts and totals by name, without their prefix."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        lines = response.read().decode()
    found = re.findall(r"^(?:pdjax|vllm):(\w+_(?:sum|count|total))\{.*\} (\S+)$", lines, re.M)
    values: Counter[str] = Counter()
    for name, value in found:
        values[name] += float(value)  # of all labels
    return values


def told(run: Counter[str], seconds: float) -> list[str]:
    """The lines that are printed."""
    tokens, ended = run["generation_tokens_total"], run["e2e_request_latency_seconds_count"]
    lines = [f"{'choices that ended':32}{ended:12.0f}"]
    for name, title in SHOWN.items():
        count = run[f"{name}_count"]
        mean = 1e3 * run[f"{name}_sum"] / count if count else float("nan")
        lines.append(f"{title:32}{mean:12.2f}")
    lines.append(f"{'output tokens':32}{tokens:12.0f}")
    lines.append(f"{'seconds, start of the program included':32}{seconds:6.1f}")
    return lines


def main(url: str, *command: str) -> int:
    """Run the command; its exit status."""
    before, begun = metrics(url), time.monotonic()
    status = subprocess.call(command)
    seconds, after = time.monotonic() - begun, metrics(url)
    after.subtract(before)
    print(f"\nWhat {url} itself has measured meanwhile:")
    print("\n".join(told(after, seconds)))
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
