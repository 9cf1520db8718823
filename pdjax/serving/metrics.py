"""Metrics in Prometheus's text format: vLLM's families and buckets, under the prefix `pdjax:`, or
under vLLM's own."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector

from pdjax.core.outputs import RequestOutput
from pdjax.core.request import SamplingParams
from pdjax.host.metrics.request import RequestMetrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""The only format that is written: names with a colon are changed in OpenMetrics' one."""

_FIRST = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_GAP = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
_WHOLE = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0),
    *(240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_REQUEST = ["model_name"]

SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""The variable by which the package keeps what is counted in files, one of each process."""

OWN = "pdjax:"
"""Prefix of families that only this server has."""
VLLM = "vllm:"
"""Prefix of vLLM's families, where dashboards made for vLLM are to work."""


def _up_to(most: int) -> list[int]:
    """1, 2, 5, 10, ... up to `most`."""
    steps = (digit * 10**power for power in range(len(str(most))) for digit in (1, 2, 5))
    return [step for step in steps if step <= most] or [1]


class ServerMetrics:
    """What a front has served. Latencies are the coordinator's own, without HTTP.

    Args:
      model: name of the model.
      max_model_len: bounds the buckets of lengths.
      vllm_names: whether the families that vLLM has, too, are written under its prefix.
    """

    def __init__(self, model: str, max_model_len: int, vllm_names: bool = False) -> None:
        self._registry = CollectorRegistry()
        self._model, self._prefix = model, VLLM if vllm_names else OWN
        self._max_model_len = max_model_len
        lengths = _up_to(max_model_len)
        self._prompt = self._counter("prompt_tokens", "Prompt tokens of requests that ended.")
        self._cached = self._counter("prompt_tokens_cached", "Prompt tokens whose KV was reused.")
        self._generated = self._counter("generation_tokens", "Tokens generated.").labels(model)
        self._queries = self._counter("prefix_cache_queries", "Tokens looked up in prefix caches.")
        self._hits = self._counter("prefix_cache_hits", "Tokens found in prefix caches.")
        self._preempted = self._counter("num_preemptions", "Sequences that started over.")
        self._success = self._counter("request_success", "Choices that ended.", "finished_reason")
        self._refused = self._counter("admission_rejections", "Requests refused.", "reason")
        self._responses = Counter(
            f"{OWN}http_responses",
            "Responses.",
            [*_REQUEST, "path", "status"],
            registry=self._registry,
        )
        seconds, tokens = self._seconds, self._histogram
        self._ttft = seconds("time_to_first_token", "Arrival to first token.", _FIRST)
        self._itl = seconds("inter_token_latency", "Each gap between tokens.", _GAP)
        self._tpot = seconds(
            "request_time_per_output_token", "Mean gap between tokens of a choice.", _GAP
        )
        self._e2e = seconds("e2e_request_latency", "Arrival to last token.", _WHOLE)
        self._queue = seconds("request_queue_time", "Arrival to first prefill step.", _WHOLE)
        self._inference = seconds(
            "request_inference_time", "First prefill step to last token.", _WHOLE
        )
        self._prefill = seconds(
            "request_prefill_time", "First prefill step to first token.", _WHOLE
        )
        self._decode = seconds("request_decode_time", "First token to last token.", _WHOLE)
        self._prompts = tokens("request_prompt_tokens", "Tokens of a prompt.", lengths)
        self._outputs = tokens("request_generation_tokens", "Tokens of a choice.", lengths)
        self._longest = tokens(
            "request_max_num_generation_tokens", "Tokens of a request's longest choice.", lengths
        )
        self._most = tokens("request_params_max_tokens", "max_tokens of a request.", lengths)
        self._n = tokens("request_params_n", "n of a request.", [1, 2, 5, 10, 20])

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{self._prefix}{name}", text, [*_REQUEST, *labels], registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        family = Histogram(
            f"{self._prefix}{name}",
            text,
            _REQUEST,
            registry=self._registry,
            buckets=tuple(buckets),
        )
        return family.labels(self._model)

    def _seconds(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        return self._histogram(f"{name}_seconds", text, buckets)

    # What happens.

    def refused(self, reason: str) -> None:
        """A request was not let in: "queue_full", "draining" or "invalid"."""
        self._refused.labels(self._model, reason).inc()

    def responded(self, path: str, status: int) -> None:
        """A response has begun; paths that are not served are one."""
        self._responses.labels(self._model, path, str(status)).inc()

    def submitted(self, params: SamplingParams) -> None:
        """A request was let in."""
        self._n.observe(params.n)
        if params.max_tokens is not None:
            self._most.observe(min(params.max_tokens, self._max_model_len))  # as it is cut

    def tokens(self, count: int) -> None:
        """So many tokens have come."""
        self._generated.inc(count)  # with every token: its labels are looked up once

    def ended(self, output: RequestOutput) -> None:
        """A request has ended, or was aborted: then latencies up to a last token are left out."""
        prompt = len(output.prompt_token_ids)
        for counter in (self._prompt, self._queries):
            counter.labels(self._model).inc(prompt)
        self._prompts.observe(prompt)
        self._longest.observe(max(len(choice.token_ids) for choice in output.choices))
        for choice in output.choices:
            self._success.labels(self._model, choice.finish_reason or "error").inc()
            self._outputs.observe(len(choice.token_ids))
            if isinstance(choice.metrics, RequestMetrics):
                self._times(choice.metrics)

    def _times(self, metrics: RequestMetrics) -> None:
        for counter in (self._cached, self._hits):
            counter.labels(self._model).inc(metrics.cached_tokens)
        self._preempted.labels(self._model).inc(metrics.preemptions)
        queue, ttft, e2e = metrics.queue, metrics.ttft, metrics.e2e
        inference = decode = None
        if not metrics.completed:
            e2e = None
        if queue is not None and ttft is not None and e2e is not None:
            inference, decode = e2e - queue, e2e - ttft
        for family, value in (
            (self._ttft, ttft),
            (self._tpot, metrics.tpot if metrics.completed else None),
            (self._e2e, e2e),
            (self._queue, queue),
            (self._prefill, metrics.prefill),
            (self._inference, inference),
            (self._decode, decode),
        ):
            if value is not None:
                family.observe(value)
        _observe_all(self._itl, metrics.itl)

    # What is read.

    def text(self, report: Mapping[str, Any]) -> bytes:
        """The exposition; `report` is a backend's."""
        own = _Families(_without_created(self._counted()))
        now = _Families(_state_families(self._model, report, self._prefix))
        return generate_latest(own) + generate_latest(now)

    def _counted(self) -> CollectorRegistry:
        """What has been counted; with several fronts, what all of them have, those that have ended
        included."""
        folder = os.environ.get(SHARED_FOLDER)
        if folder is None:
            return self._registry
        shared = CollectorRegistry()
        MultiProcessCollector(shared, folder)
        return shared


def _observe_all(family: Histogram, values: Seq[float]) -> None:
    """Observe many values. One call each, as the package has it, would take the event loop 10 to 30
    ms at the end of an answer of 8,000 tokens."""
    if values:
        family._sum.inc(sum(values))
        of_bucket = np.bincount(np.searchsorted(family._upper_bounds, values))
        for place in np.flatnonzero(of_bucket):
            family._buckets[place].inc(int(of_bucket[place]))


def _without_created(registry: CollectorRegistry) -> Iterator[Metric]:
    """Its families without a moment of creation for each, which doubles their number."""
    for family in registry.collect():
        family.samples = [
            sample for sample in family.samples if not sample.name.endswith("_created")
        ]
        yield family


class _Families:
    """What `generate_latest` reads: families, once."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


_PREFIX_TOKENS = ("looked_up", "hit", "evicted", "isolated", "never_seen", "partial", "copied")
"""Prompt tokens by what came of looking for them; see `host/kv/prefix_account.py`."""

_PAGES = (
    *("pages", "free_pages", "cached_pages", "used_pages", "leaving_pages", "pinned_pages"),
    "pins",
)
"""Pages of a pool by their state, and its pinned prefixes."""

_DUTIES = ("role_changes", "outages", "draining_s", "out_of_service_s")
"""Totals of an engine that changes what it does, or is out of service."""


_DISK_STATES = ("slots", "kept", "busy_bytes")
"""What is so at this moment of the store of a tier on a disk; the others are totals."""


def _state_families(model: str, report: Mapping[str, Any], prefix: str) -> Iterator[Metric]:
    """Families of what is so at this moment, and of totals that the coordinator keeps; `prefix` is
    that of vLLM's families."""
    queue, engines, pools = report["queue"], report["engines"], report["pools"]
    one, gauge = {"": queue}, GaugeMetricFamily
    yield _family(gauge, model, "num_requests_running", one, "running", (), prefix)
    yield _family(gauge, model, "num_requests_waiting", one, "waiting", (), prefix)
    used = {name: {"share": _used(pool)} for name, pool in pools.items()}
    yield _family(gauge, model, "kv_cache_usage_perc", used, "share", ("pool",), prefix)
    for key in _PAGES:
        yield _family(GaugeMetricFamily, model, f"pool_{key}", pools, key, ("pool",))
    for key in ("prefix_rate", "prefix_ceiling"):
        known = {name: pool for name, pool in pools.items() if pool[key] is not None}
        yield _family(GaugeMetricFamily, model, f"pool_{key}", known, key, ("pool",))
    for key in _PREFIX_TOKENS:
        name = f"pool_prefix_{key}_tokens"
        yield _family(CounterMetricFamily, model, name, pools, f"prefix_{key}", ("pool",))
    totals = {"evicted_pages": "prefix_evicted_pages", "pins_made": "pins_made"}
    for name, key in {**totals, "pins_refused": "pins_refused"}.items():
        yield _family(CounterMetricFamily, model, f"pool_{name}", pools, key, ("pool",))
    tiers = report.get("tiers", {})
    for key in sorted({key for totals in tiers.values() for key in totals}):
        yield _family(CounterMetricFamily, model, key, tiers, key, ("tier",))
    disk = {"": report.get("disk") or {}}
    for key in sorted(disk[""]):
        kind = GaugeMetricFamily if key in _DISK_STATES else CounterMetricFamily
        yield _family(kind, model, f"disk_{key}", disk, key, ())
    for key in ("rows", "free_rows", "prefilling", "decoding", "steps_in_flight", "in_service"):
        yield _family(GaugeMetricFamily, model, f"engine_{key}", engines, key, ("engine",))
    for key in ("steps", "busy_seconds", "losses", *_DUTIES):
        name = f"engine_{_spelt(key)}"
        yield _family(CounterMetricFamily, model, name, engines, key, ("engine",))
    fronts = report.get("fronts", {})
    for key in ("is_ready", "connections", "open_answers"):
        yield _family(GaugeMetricFamily, model, f"front_{key}", fronts, key, ("front",))
    yield _family(CounterMetricFamily, model, "front_losses", fronts, "losses", ("front",))
    for key in ("bytes", "shipments", "wire_s"):
        name = f"link_{_spelt(key)}"
        yield _family(CounterMetricFamily, model, name, report["links"], key, ("link",))
    places = {place: {"count": count} for place, count in report["prefills"].items()}
    yield _family(CounterMetricFamily, model, "prefills", places, "count", ("place",))
    for key, value in report["transfers"].items():
        name = f"handoff_{_spelt(key)}"
        yield _family(CounterMetricFamily, model, name, {"": {key: value}}, key, ())


def _spelt(key: str) -> str:
    """A key of a report as part of a metric's name, with its unit in full."""
    return re.sub(r"_s$", "_seconds", key)


def _used(pool: Mapping[str, Any]) -> float:
    return pool["used_pages"] / pool["pages"] if pool["pages"] else 0.0


def _family(
    kind: Any,
    model: str,
    name: str,
    of_each: Mapping[str, Mapping[str, Any]],
    key: str,
    labels: tuple[str, ...],
    prefix: str = OWN,
) -> Metric:
    text = f"{name.replace('_', ' ')}; see docs/serving.md"
    family = kind(f"{prefix}{name}", text, labels=[*_REQUEST, *labels])
    for each, values in of_each.items():
        family.add_metric([model, *([each] if labels else [])], values[key])
    return family
