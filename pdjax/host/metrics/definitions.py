"""Every key of a report, its unit and its meaning; each is said here and nowhere else.

    python -m pdjax.host.metrics.definitions > docs/metrics.md

A key that a report has and no group here names, or the other way round, fails a test.
"""

import sys
from collections.abc import Mapping

from pdjax.host.metrics.bench_definitions import BENCH_GROUPS, PERCENTILES
from pdjax.host.metrics.metric import Metric, metrics_of

STATISTICS = ("mean", "median", "std", "p90", "p99")
"""What `summary.summarize` takes of each metric in `SAMPLED`, unless other percentiles are asked
for: the keys are `mean_ttft_ms` and so on."""


REQUEST = metrics_of(
    ("id", "", "of the sequence: the request's id, # and the number of the choice"),
    (
        "finish_reason",
        "",
        "stop, length, abort or error; shed where it was refused for want of room; null while it "
        "runs",
    ),
    ("arrival_s", "s", "moment of arrival on the run's clock"),
    ("input_len", "tokens", "of the prompt"),
    ("cached_len", "tokens", "of the prompt whose KV was found, and not computed"),
    ("output_len", "tokens", "generated"),
    (
        "prefilled_locally",
        "",
        "true if its first prefill was on an engine that decodes, too; false on one that is for "
        "prefill alone; null before, and of a server",
    ),
    ("queue_ms", "ms", "arrival to the dispatch of the first prefill chunk"),
    ("prefill_ms", "ms", "from there to the first token; queue_ms + prefill_ms = ttft_ms"),
    ("ttft_ms", "ms", "time to first token: first token - arrival"),
    ("row_wait_ms", "ms", "of the first gap: waiting for a decode row and pages"),
    ("kv_wait_ms", "ms", "of the first gap: its row held, waiting for KV on its way"),
    ("tick_wait_ms", "ms", "of the first gap: its KV there, until its first tick was dispatched"),
    (
        "first_tick_ms",
        "ms",
        "of the first gap: the rest, so that row_wait_ms + kv_wait_ms + tick_wait_ms + "
        "first_tick_ms = itls_ms[0]; the tick itself, and all that a preemption takes",
    ),
    ("tpot_ms", "ms", "(last token - first token) / (output_len - 1); null for a single token"),
    ("e2el_ms", "ms", "end-to-end latency: last token - arrival"),
    ("itls_ms", "ms", "inter-token latencies: each gap between successive tokens"),
    ("reserved_ms", "ms", "arrival to the first reservation of a decode row and pages"),
    ("sent_ms", "ms", "arrival to the first shipment of its first hand-off"),
    (
        "written_ms",
        "ms",
        "arrival to when all KV of its first hand-off was written, or its writes dispatched in "
        "order before the first tick",
    ),
    ("preemptions", "1", "times that its KV was given up, to be computed again"),
    ("transfer", "", "its hand-offs, by the keys of transfers"),
)
"""Of each entry of `requests`."""

TRANSFER = metrics_of(
    ("transfers", "1", "hand-offs that were completed"),
    ("shipments", "1", "transfer jobs that carried KV which was wanted"),
    ("bytes", "B", "over the wire, padding and checksums included"),
    (
        "pages",
        "pages",
        "of the source; one that travels by layer groups counts in each shipment",
    ),
    ("pieces", "1", "single-device arrays that were put"),
    ("puts", "1", "batched device_put calls"),
    ("layout_changing_puts", "1", "puts by way of the host's memory; must be 0"),
    ("pages_skipped", "pages", "of the target, that held their KV already (delta hand-off)"),
    ("retries", "1", "attempts that failed, timed out or arrived damaged; of the run alone"),
    (
        "reprefilled_tokens",
        "tokens",
        "computed again because a hand-off had failed for good; of the run alone; must be 0 where "
        "nothing fails",
    ),
    (
        "seconds",
        "s",
        "end of the prefill, or start of the hand-off if that was later, to the last page's "
        "landing: what a hand-off delays",
    ),
    (
        "gather_s",
        "s",
        "dispatch of a shipment, or end of its prefill if that was later, to the reading of its "
        "pages",
    ),
    (
        "wire_s",
        "s",
        "from there to its arrival; where the host did not look in between, the time that so many "
        "bytes take at the link's peak",
    ),
    ("scatter_s", "s", "arrival of a shipment to its being written"),
    ("exposed_s", "s", "of the time on the wire, what came after the end of the prefill"),
    ("hidden_s", "s", "of the time on the wire, the rest: the prefill still ran"),
)
"""Of `transfers`, and of `transfer` in each request."""

LINK = metrics_of(
    ("bytes", "B", "that arrived"),
    ("shipments", "1", "that arrived"),
    ("wire_s", "s", "in which at least one shipment was on the wire"),
    ("bytes_per_s", "B/s", "bytes / wire_s"),
    (
        "peak_bytes_per_s",
        "B/s",
        "of a plain put between one pair of devices, measured at the start, times the pairs that "
        "there are; null if it was not",
    ),
    ("of_peak", "1", "bytes_per_s / peak_bytes_per_s"),
)
"""Of each entry of `links`, which are named SOURCE->TARGET by their pools."""

PREFILLS = metrics_of(
    ("local", "1", "sequences prefilled first on an engine that decodes, too"),
    ("remote", "1", "sequences prefilled first on an engine that is for prefill alone"),
)
"""Of `prefills`."""

DUTY = metrics_of(
    ("role_changes", "1", "times that the engine began to have another role"),
    ("outages", "1", "times that the engine went out of service"),
    ("draining_s", "s", "in which it was given no more of what it would not do afterwards"),
    ("out_of_service_s", "s", "in which it was given nothing; of times that are over"),
)
"""Of an engine that changes what it does."""

ENGINE = metrics_of(
    ("steps", "1", "prefill steps and ticks that have come back"),
    ("busy_seconds", "s", "covered by at least one step, from its dispatch to its outcome"),
    ("occupancy", "1", "active rows / rows, over all ticks; null without ticks"),
    (
        "bubble_share",
        "1",
        "stage-ticks without an active row / stage-ticks, over all ticks; null without ticks",
    ),
    ("sums", "", "counts, added up over the steps"),
)
"""Of each entry of `engines`."""

SUMS = metrics_of(
    ("tokens", "tokens", "of prompts that prefill steps computed, padding not counted"),
    ("sequences", "1", "with a chunk in a prefill step"),
    ("rows_active", "1", "rows with a sequence in a tick"),
    ("rows", "1", "rows of a tick"),
    ("stages_active", "1", "stages with an active row under them in a tick"),
    ("stages", "1", "stages of a tick"),
)
"""Of `sums` of an engine: the first two of prefill steps, the others of ticks."""

RUN = metrics_of(
    ("duration", "s", "last token of the run - first arrival"),
    ("completed", "1", "requests that ran to their proper end"),
    ("failed", "1", "requests that ended in an error"),
    ("shed", "1", "requests that were refused for want of room, before anything was done for them"),
    ("aborted", "1", "requests that were aborted"),
    ("total_input_tokens", "tokens", "of the prompts of completed requests"),
    ("total_output_tokens", "tokens", "that completed requests were answered"),
    ("request_throughput", "1/s", "completed / duration"),
    (
        "request_goodput",
        "1/s",
        "completed requests that met every SLO / duration; null without SLOs",
    ),
    ("slo_good", "1", "completed requests that met every SLO, their own first; null without SLOs"),
    (
        "slo_total",
        "1",
        "completed + failed + shed, of those that have an SLO; null without SLOs",
    ),
    ("slo_attainment", "1", "slo_good / slo_total; null without SLOs"),
    ("output_throughput", "tokens/s", "total_output_tokens / duration"),
    ("total_token_throughput", "tokens/s", "tokens of prompts and answers / duration"),
    (
        "max_output_tokens_per_s",
        "tokens/s",
        "most tokens in one of the seconds that follow each other from the first arrival on",
    ),
    (
        "max_concurrent_requests",
        "1",
        "most requests that were at one moment between arrival and last token",
    ),
    ("requests", "", "each request that has ended, see below"),
    ("engines", "", "each engine, by its name"),
    ("transfers", "", "all hand-offs"),
    ("alarms", "", "keys of transfers that should be 0 and are not"),
    ("links", "", "each pair of pools between which KV moved"),
    ("prefills", "", "where sequences were prefilled"),
    ("duties", "", "each engine that has drained or been out of service, by its name"),
    ("definitions", "", "these meanings, by group and key"),
)
"""Of the report itself. Those of completed requests are about them alone."""

SAMPLED = ("queue", "ttft", "row_wait", "kv_wait", "tick_wait", "tpot", "itl", "icl", "e2el")
"""Metrics of requests of which the report has statistics; gaps are pooled over requests. `itl` is
of every token: those that came in one chunk have gaps of 0 between them. `icl`, inter-chunk
latency, is of what came apart, which is what vLLM's benchmark calls ITL."""

GROUPS = {
    "report": RUN,
    "requests": REQUEST,
    "transfers": TRANSFER,
    "links": LINK,
    "prefills": PREFILLS,
    "engines": ENGINE,
    "duties": DUTY,
    "sums": SUMS,
}
"""Of a report."""


def statistic_keys(name: str, statistics: tuple[str, ...] = STATISTICS) -> list[str]:
    """The report's keys of the statistics of one of `SAMPLED`."""
    return [f"{statistic}_{name}_ms" for statistic in statistics]


def definitions(
    groups: Mapping[str, tuple[Metric, ...]] = GROUPS,
) -> dict[str, dict[str, str]]:
    """Meaning and unit by group and key, as a report carries them along."""
    return {
        group: {m.key: f"{m.meaning} [{m.unit}]" if m.unit else m.meaning for m in metrics}
        for group, metrics in groups.items()
    }


_HEADINGS = {
    "report": (
        "The report",
        "`LLM.report()` has these keys, and for each metric in "
        f"{', '.join(f'`{name}`' for name in SAMPLED)} the statistics "
        f"{', '.join(f'`{key}`' for key in statistic_keys('METRIC'))}, in milliseconds, over "
        "completed requests; percentiles interpolate linearly. The keys are those of vLLM's "
        "serving benchmark where it has such a metric. `itl` is of every token, so that tokens of "
        "one chunk have gaps of 0 between them; `icl`, inter-chunk latency, is of what came apart, "
        "and is what vLLM's benchmark calls ITL. The newest requests, steps and shipments are "
        "kept, as many as `max_recorded` says; totals are of the whole run.",
    ),
    "requests": (
        "A request",
        "Entries of `requests`, `RequestOutput.metrics.to_json()`. A token's moment is that of its "
        "arrival on the host. Each choice of a request is an entry, as each is prefilled. The "
        "first gap is the time between the first token and the second one: the hand-off lies in "
        "it.",
    ),
    "transfers": (
        "Hand-offs",
        "Of the run in `transfers`, of a sequence in `transfer` of its request. A shipment is a "
        "transfer job. One that several sequences share counts whole in each, but for its bytes "
        "and pages, of which each has its own part; in `transfers` it counts once. Seconds of "
        "different shipments overlap, so that their sum may exceed the run's duration.",
    ),
    "links": ("A link", "Entries of `links`, by the names of its pools: `SOURCE->TARGET`."),
    "prefills": ("Prefills by place", "Of the run, in `prefills`."),
    "engines": ("An engine", "Entries of `engines`, by its name."),
    "duties": (
        "Roles and outages",
        "Entries of `duties`, by the engine's name; see [scheduling.md](scheduling.md). The trace "
        "has a slice for each time.",
    ),
    "sums": ("Counts of steps", "Of `sums` of an engine, and `args` of a slice in the trace."),
    "bench": (
        "A benchmark",
        "The results of `pdjax bench` ([bench.md](bench.md)), one object of JSON: the keys of a "
        "report, without `requests` and, of a URL, without `engines`, `transfers`, `links` "
        "and `prefills`; "
        f"statistics with the percentiles {', '.join(map(str, PERCENTILES))}; and these. Keys of "
        "vLLM's serving benchmark mean what they mean there, but for ITL (see `icl`), and for the "
        "moment at which a request's clock begins.",
    ),
    "details": ("Details", "With `--save_detailed`, as vLLM has them, in seconds."),
    "records": (
        "A record",
        "A line of `pdjax bench --records=FILE`, which has the keys of a request, too.",
    ),
    "capacity": ("Capacity goodput", "Of `capacity` in the results."),
}


_TRACE = """
## The trace

`LLM.write_trace(path)` and `pdjax trace` write Chrome trace events, which https://ui.perfetto.dev
opens. Time begins at 0; `otherData.clock_at_0_s` says when that was on the run's clock.

* **engines**, a track for each: prefill steps by their numbers, and ticks. `args` are the counts
  above, `who` was served, and `ahead_us`: how much earlier than it is shown a step was dispatched.
* **wires**, a track for each link, and more where shipments overlap: a slice a shipment, and in it
  `gather` (sent until read; a shipment that leaves with a step waits for its layers), `wire` (read
  until arrived) and `scatter` (arrived until written).
* **requests**, a row for each sequence: `queue`, `prefill`, `wait for row`, `transfer`, `wait for
  tick`, `decode`; its tokens; the moments `reserved`, `sent`, `transfer_landed` and `preempted`.
* **counters**: free pages of each pool, looked at when steps and hand-offs begin and end; bytes of
  each link that were sent and have not arrived; sequences that wait, and that run.

An arrow leads from the prefill step that a shipment left with, through its `wire`, to the first
tick in which its sequence decodes.

`--plot` draws the same. SmolLM2 on two virtual devices of 2 cores that had much else to do: `pdjax
trace --requests=6 --rate=0.7 --prompt_tokens=80 --max_tokens=10 --config.model.max_model_len=256
--config.handoff.layer_groups=3 --plot=timeline.png`.

![Engines, requests and counters of six requests on a CPU](pictures/cpu_timeline.png)

![A hand-off in close-up: three layer groups leave during the step](pictures/cpu_handoff.png)
""".rstrip().split("\n")


def markdown() -> str:
    """The page docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "<!-- Generated: python -m pdjax.host.metrics.definitions > docs/metrics.md -->",
        "",
        "Every key, defined once in `pdjax/host/metrics/definitions.py`. Unit 1 is a count or a "
        "share. Counts are whole numbers.",
    ]
    for group, (heading, text) in _HEADINGS.items():
        lines += ["", f"## {heading}", "", text, "", "| key | unit | meaning |", "|---|---|---|"]
        lines += [f"| `{m.key}` | {m.unit} | {m.meaning} |" for m in (GROUPS | BENCH_GROUPS)[group]]
    return "\n".join([*lines, *_TRACE]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
