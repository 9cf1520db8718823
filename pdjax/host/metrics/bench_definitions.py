"""The keys of a benchmark's results, their units and their meanings, for `definitions.py`."""

from pdjax.host.metrics.metric import metrics_of

PERCENTILES = (90, 95, 99)
"""Of a benchmark, besides mean, median and standard deviation."""

BENCH = metrics_of(
    ("date", "", "of the start, UTC, YYYYMMDD-HHMMSS"),
    ("endpoint_type", "", "what was driven: pdjax, sim, or openai of a URL"),
    ("backend", "", "the same, under its older name"),
    ("label", "", "of the run, as it was given"),
    ("model_id", "", "of the config, or as the server calls it"),
    ("tokenizer_id", "", "the same: prompts are token ids"),
    ("num_prompts", "1", "requests that were measured, well or not; warm-up is left out"),
    ("num_warmups", "1", "requests of the warm-up, which no number is about"),
    (
        "request_rate",
        "1/s",
        "offered, by the moments of those that wait for no other; inf, as a string, where all come "
        "at once",
    ),
    ("burstiness", "1", "of the arrivals that were drawn: 1 / their squared CV; null of others"),
    ("max_concurrency", "1", "clients of a closed loop; null in an open loop"),
    ("mean_late_ms", "ms", "sent - due, the mean: it lies in TTFT, which begins when one is due"),
    ("max_late_ms", "ms", "the most of it"),
    ("total_cached_tokens", "tokens", "of prompts, found in a prefix cache; null where unknown"),
    ("rtfx", "1", "of audio in vLLM's benchmark; 0 here"),
    ("disagg", "", "whether prefill and decode have devices of their own; null of a URL"),
    ("num_gpu", "1", "all chips, of both phases; null of a URL unless it is given"),
    ("num_prefill_gpu", "1", "chips of prefill engines; those of colocated engines count in both"),
    ("num_decode_gpu", "1", "chips of decode engines"),
    ("prefill_tp", "1", "of each prefill engine"),
    ("prefill_num_workers", "1", "prefill engines"),
    ("decode_tp", "1", "of each stage of a decode engine"),
    ("decode_num_workers", "1", "decode engines"),
    ("tput_per_gpu", "tokens/s", "total_token_throughput / num_gpu"),
    ("output_tput_per_gpu", "tokens/s", "output_throughput / num_gpu, of all chips"),
    ("input_tput_per_gpu", "tokens/s", "tokens of prompts / duration / num_gpu, of all chips"),
    ("goodput_per_gpu", "1/s", "request_goodput / num_gpu"),
    ("mean_intvty", "tokens/s", "interactivity: 1000 / mean_tpot_ms"),
    ("median_intvty", "tokens/s", "1000 / median_tpot_ms"),
    ("p99_intvty", "tokens/s", "1000 / p99_tpot_ms: the slow end"),
    (
        "slo",
        "",
        "the bounds that make a request good, in milliseconds; those that a request comes with "
        "take their place, one by one",
    ),
    ("capacity", "", "of a search or a sweep over rates, see below; else null"),
    ("runs", "", "of a search or a sweep, the results of each run, with no such keys; else null"),
    ("seed", "1", "of all chance of the workload"),
    ("salt", "", "prompts of another salt are other tokens, so that no prefix cache has them"),
    ("workload", "", "what was played: the flags that it was made of"),
    ("config", "", "of the engines; null of a URL"),
    (
        "costs",
        "",
        "of a simulation: what its steps and links take, in seconds and bytes a second, with the "
        "calibration, its hardware and its sources; null of others",
    ),
    ("versions", "", "of Python and packages"),
    ("command", "", "the command line"),
    (
        "errors_by_reason",
        "",
        "how many requests failed or were shed, by the beginning of the reason",
    ),
)
"""Of the results of `pdjax bench`, besides those of a report; those that vLLM's serving benchmark
or InferenceX have bear their names."""

DETAILS = metrics_of(
    ("input_lens", "tokens", "of each request that was measured, in order"),
    ("output_lens", "tokens", "likewise; 0 of one that failed"),
    ("ttfts", "s", "likewise; 0 of one without a token"),
    ("itls", "s", "likewise, a list a request"),
    ("start_times", "s", "likewise, after the start of the workload: when it was due"),
    ("generated_texts", "", "likewise; empty, as tokens are asked for"),
    ("errors", "", "likewise; empty of one that completed"),
)
"""Of the results with --save_detailed, as vLLM's benchmark has them."""

RECORD = metrics_of(
    ("number", "1", "of the request in the workload"),
    ("session", "", "its conversation or its client; empty of none"),
    ("turn", "1", "its number in the session, from 0"),
    ("phase", "", "warmup or profiling: only the latter are measured"),
    ("due_s", "s", "when it was due, after the start of the workload; its clock begins then"),
    ("late_ms", "ms", "sent - due"),
    ("error", "", "why it failed or was shed; null of others"),
    ("slo", "", "the bounds that it was held against, in milliseconds; null without"),
    ("good", "", "whether it met every SLO; null without SLOs"),
    ("metadata", "", "session, turn, moments in ns, phase, under the names of aiperf's export"),
    ("metrics", "", "values and units under the names of aiperf's export, whose ITL is our TPOT"),
)
"""Of a line of the records of `pdjax bench`, besides those of a request."""

CAPACITY = metrics_of(
    (
        "rate",
        "1/s",
        "capacity goodput: the highest rate measured up to which every rate holds, that is, at "
        "least `share` of all requests are good; null where the lowest does not",
    ),
    ("share", "1", "of the requests that must be good"),
    ("good", "1", "good requests at that rate; the numerator"),
    ("total", "1", "completed + failed + shed at that rate; the denominator"),
    (
        "interpolated",
        "1/s",
        "where the line from there to the next rate crosses `share`, after DistServe; null where "
        "no rate fails or none holds",
    ),
    ("per_gpu", "1/s", "rate / num_gpu"),
    ("points", "", "rate, good and total of each rate measured, in the order of rates"),
)
"""Of `capacity`. A rate is what was offered; requests of several runs at one rate are pooled."""

BENCH_GROUPS = {"bench": BENCH, "details": DETAILS, "records": RECORD, "capacity": CAPACITY}
"""Of the results of `pdjax bench`."""
