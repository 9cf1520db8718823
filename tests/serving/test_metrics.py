"""The names of metrics: ours, vLLM's where they are asked for, and those that our Grafana dashboard
queries."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Histogram

from pdjax.core.request import SamplingParams
from pdjax.serving import metrics
from pdjax.serving.backend import Ask
from pdjax.serving.front import Front, Settings
from tests.helpers.fake_backend import FakeBackend
from tests.helpers.fences import ROOT

BOARD = ROOT / "examples/serving/grafana.json"

# What prometheus_grafana/grafana.json of vLLM's examples queries.
VLLM_BOARD = {
    *(
        f"vllm:{family}_{part}"
        for family in (
            "e2e_request_latency_seconds",
            "inter_token_latency_seconds",
            "time_to_first_token_seconds",
            "request_prompt_tokens",
            "request_generation_tokens",
            "request_max_num_generation_tokens",
            "request_queue_time_seconds",
            "request_prefill_time_seconds",
            "request_decode_time_seconds",
        )
        for part in ("bucket", "sum", "count")
    ),
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
}


def samples_of(folder: Path, **settings: Any) -> dict[str, set[str]]:
    """The names of all samples after a request, each with the labels that it has."""

    async def scrape() -> str:
        front = Front(FakeBackend(folder), Settings(**settings))
        [answer] = await front.submit([Ask((1, 2), SamplingParams(max_tokens=4))])
        async for _ in answer:
            pass
        front.metrics.responded("/v1/completions", 200)
        front.metrics.refused("draining")
        text = front.metrics.text(await front.backend.report()).decode()
        await front.close()
        return text

    found: dict[str, set[str]] = {}
    for line in asyncio.run(scrape()).splitlines():
        if not line.startswith("#"):
            name, labels = line.split("{")
            found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return found


def test_the_switch_gives_vllms_families_its_names(tmp_path: Path):
    own, switched = samples_of(tmp_path), samples_of(tmp_path, vllm_metric_names=True)
    assert all(name.startswith("pdjax:") for name in own)
    assert set(switched) >= VLLM_BOARD
    bare = {name.partition(":")[2] for name in switched}
    assert bare == {name.partition(":")[2] for name in own}
    for name in (
        *("http_responses_total", "engine_rows", "pool_pages", "handoff_bytes_total"),
        "prefills_total",
    ):
        assert f"pdjax:{name}" in switched and f"vllm:{name}" not in switched


@pytest.fixture
def board() -> Any:
    return json.loads(BOARD.read_text("utf-8"))


def test_every_metric_and_label_of_the_dashboard_exists(board: Any, tmp_path: Path):
    samples = samples_of(tmp_path)
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            names = re.findall(r"[a-z]+:\w+", target["expr"])
            assert names, target
            for name in names:
                assert name in samples, f"{panel['title']}: {name}"
            grouped = re.findall(r"by \(([^)]*)\)", target["expr"])
            shown = re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
            labels = {each for group in grouped for each in group.split(", ")} | set(shown)
            assert labels <= samples[names[0]], f"{panel['title']}: {labels}"
    variables = json.dumps(board["templating"])
    assert set(re.findall(r"pdjax:\w+", variables)) <= set(samples)


def test_panels_do_not_overlap_and_take_the_chosen_source(board: Any):
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == "${datasource}"
            assert 'model_name="$model_name"' in target["expr"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_many_gaps_are_counted_as_one_by_one():
    together, alone = (CollectorRegistry() for _ in range(2))
    families = [
        Histogram("gap", "Gaps.", buckets=(0.1, 0.2, 0.4), registry=registry)
        for registry in (together, alone)
    ]
    gaps = (0.05, 0.1, 0.10001, 0.3, 0.4, 7.0)
    metrics._observe_all(families[0], ())
    metrics._observe_all(families[0], gaps)
    for gap in gaps:
        families[1].observe(gap)
    assert counts_of(together) == counts_of(alone)


def counts_of(registry: CollectorRegistry) -> dict[tuple[str, ...], Any]:
    return {
        (sample.name, *sample.labels.values()): pytest.approx(sample.value)
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }
