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
from collections import defaultdict

SHOWN = {
    "time_to_first_token_seconds": "TTFT, mean, ms",
    "inter_token_latency_seconds": "ITL, mean, ms",
    "request_time_per_output_token_seconds": "TPOT, mean of requests, ms",
    "e2e_request_latency_seconds": "latency of a request, mean, ms",
}
"""Histograms of the server, and how they are called here."""


def metrics(url: str) -> dict[str, float]:
    """Sums, counts and totals by name, without their prefix; 0 of what has not happened."""
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
            lines = response.read().decode()
    except OSError as error:
        sys.exit(f"{url}/metrics: {error}")
    found = re.findall(r"^(?:pdjax|vllm):(\w+_(?:sum|count|total))\{.*\} (\S+)$", lines, re.M)
    values: dict[str, float] = defaultdict(float)
    for name, value in found:
        values[name] += float(value)  # of all labels
    return values


def told(before: dict[str, float], after: dict[str, float], seconds: float) -> list[str]:
    """The lines that are printed."""

    def grown(name: str) -> float:
        return after[name] - before[name]

    lines = [f"{'choices that ended':32}{grown('e2e_request_latency_seconds_count'):12.0f}"]
    for name, title in SHOWN.items():
        count = grown(f"{name}_count")
        mean = 1e3 * grown(f"{name}_sum") / count if count else float("nan")
        lines.append(f"{title:32}{mean:12.2f}")
    lines.append(f"{'output tokens':32}{grown('generation_tokens_total'):12.0f}")
    lines.append(f"{'the whole program, s':32}{seconds:12.1f}")
    return lines


def main(url: str, *command: str) -> int:
    """Run the command; its exit status."""
    before, begun = metrics(url), time.monotonic()
    status = subprocess.call(command)
    seconds, after = time.monotonic() - begun, metrics(url)
    print(f"\nWhat {url} itself has measured meanwhile:")
    print("\n".join(told(before, after, seconds)))
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
