"""`pdjax bench`: on simulated engines, on a tiny model, and what it refuses."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdjax import cli
from pdjax.core.clock import unix_ns
from pdjax.flags import status
from pdjax.host.metrics import definitions
from pdjax.host.metrics.bench_definitions import BENCH, CAPACITY, DETAILS, PERCENTILES, RECORD
from pdjax.host.metrics.metric import Metric
from pdjax.sim import calibration
from pdjax.workloads.files import read_workload
from tests.frontend.test_trace_command import TINY

SIM = ("--backend=sim", "--num_prompts=30", "--input_len=100-400", "--output_len=1-20")
GOODPUT = ("--goodput=ttft:300", "--goodput=tpot:10")


def bench(*args: str) -> int:
    command = cli.COMMANDS["bench"]
    return status(command.main, command.values, command.usage, ["pdjax bench", *args])


def results(folder: Path, *args: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    out, records = folder / "deep" / "out.json", folder / "records.jsonl"
    assert bench(f"--out={out}", f"--records={records}", *args) == 0
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    return json.loads(out.read_text()), lines


def keys(*groups: tuple[Metric, ...]) -> set[str]:
    return {metric.key for group in groups for metric in group}


def test_every_key_is_defined_and_every_definition_is_a_key(tmp_path: Path):
    whole, lines = results(tmp_path, *SIM, *GOODPUT, "--save_detailed", "--metadata=rack=7")
    kinds = ("mean", "median", "std", *(f"p{n}" for n in PERCENTILES))
    statistics = {
        key for name in definitions.SAMPLED for key in definitions.statistic_keys(name, kinds)
    }
    expected = keys(definitions.RUN, BENCH, DETAILS) - {"requests"} | statistics | {"rack"}
    assert set(whole) == expected and whole["rack"] == "7"
    assert all(set(line) == keys(definitions.REQUEST, RECORD) for line in lines)
    assert set(whole["definitions"]) >= {"bench", "records", "capacity", "details", "report"}


def test_a_run_has_its_requests_and_leaves_the_warm_up_out(tmp_path: Path):
    args = (*SIM, *GOODPUT, "--num_warmups=3", "--save_detailed", "--request_rate=20")
    whole, lines = results(tmp_path, *args)
    assert (whole["completed"], whole["failed"], whole["shed"]) == (30, 0, 0)
    assert (whole["num_prompts"], whole["num_warmups"]) == (30, 3)
    assert [line["phase"] for line in lines] == ["warmup"] * 3 + ["profiling"] * 30
    measured = lines[3:]
    assert [line["number"] for line in measured] == list(range(30))
    assert whole["mean_ttft_ms"] == pytest.approx(np.mean([line["ttft_ms"] for line in measured]))
    assert whole["slo_good"] == sum(line["good"] for line in measured)
    assert whole["slo_total"] == 30 and whole["request_rate"] == 20
    assert whole["ttfts"] == pytest.approx([line["ttft_ms"] / 1e3 for line in measured])
    assert whole["start_times"] == pytest.approx([line["due_s"] for line in measured])
    assert whole["total_output_tokens"] == sum(whole["output_lens"])
    assert whole["engines"]["prefill/0"]["sums"]["tokens"] == sum(whole["input_lens"])
    assert whole["mean_late_ms"] == 0  # on a virtual clock
    first = measured[0]
    assert first["metrics"]["time_to_first_token"] == {"value": first["ttft_ms"], "unit": "ms"}
    assert first["metadata"]["benchmark_phase"] == "profiling"
    assert whole["workload"]["input_len"] == "100-400" and whole["seed"] == 0
    assert whole["config"]["decode"]["rows"] == 8 and "numpy" in whole["versions"]


def test_numbers_a_chip_are_of_all_chips(tmp_path: Path):
    more = ("--config.prefill.engines=2", "--config.prefill.tp=2", "--config.decode.stages=2")
    whole, _ = results(tmp_path, *SIM, *more)
    assert (whole["num_prefill_gpu"], whole["num_decode_gpu"], whole["num_gpu"]) == (4, 2, 6)
    assert whole["disagg"] is True
    assert whole["tput_per_gpu"] == pytest.approx(whole["total_token_throughput"] / 6)
    assert whole["output_tput_per_gpu"] == pytest.approx(whole["output_throughput"] / 6)
    assert whole["input_tput_per_gpu"] + whole["output_tput_per_gpu"] == pytest.approx(
        whole["tput_per_gpu"]
    )
    assert whole["median_intvty"] == pytest.approx(1000 / whole["median_tpot_ms"])
    assert whole["slo_good"] is whole["goodput_per_gpu"] is None


def test_colocated_engines_are_one_chip(tmp_path: Path):
    whole, _ = results(tmp_path, *SIM, "--config=smollm2_colocated")
    assert whole["num_gpu"] == 1 and whole["disagg"] is False
    assert whole["transfers"]["bytes"] == 0


def test_the_same_seed_is_the_same_run_and_other_rates_have_the_same_requests(tmp_path: Path):
    def lines(*args: str) -> list[dict[str, Any]]:
        return results(tmp_path, *SIM, *args)[1]

    assert lines("--seed=3") == lines("--seed=3")
    slow, fast = lines("--request_rate=2"), lines("--request_rate=50", "--burstiness=0.5")
    for name in ("input_len", "output_len"):
        assert [line[name] for line in slow] == [line[name] for line in fast]
    assert [line["input_len"] for line in lines("--seed=4")] != [line["input_len"] for line in slow]


def test_a_closed_loop_has_so_many_under_way(tmp_path: Path):
    whole, lines = results(tmp_path, *SIM, "--max_concurrency=4", "--think_s=0.1")
    assert (whole["max_concurrency"], whole["max_concurrent_requests"]) == (4, 4)
    assert whole["request_rate"] == "inf" and whole["burstiness"] is None
    assert {line["session"] for line in lines if line["turn"]} == {f"client{i}" for i in range(4)}


def test_conversations_find_what_was_said_in_the_prefix_cache(tmp_path: Path):
    args = ("--turns=3", "--turn_input_len=20", "--think_s=0.5", "--config.kv.prefix_cache")
    whole, lines = results(tmp_path, *SIM, *args, "--num_warmups=0")
    assert whole["completed"] == len(lines) == 90
    later = [line for line in lines if line["turn"]]
    assert all(line["cached_len"] > 0 for line in later)
    assert whole["total_cached_tokens"] == sum(line["cached_len"] for line in lines)


def test_rates_are_compared_by_pairs_of_the_same_requests(tmp_path: Path, capsys):
    whole, lines = results(tmp_path, *SIM, *GOODPUT, "--rates=4,400,40")
    assert set(whole["capacity"]) == keys((*CAPACITY,))
    points = whole["capacity"]["points"]
    assert [point["rate"] for point in points] == [4, 40, 400]
    assert [point["good"] for point in points] == [run["slo_good"] for run in whole["runs"]]
    assert whole["capacity"]["rate"] == whole["request_rate"]
    assert len(lines) == 1 + 3 * 30
    assert len({run["total_input_tokens"] for run in whole["runs"]}) == 1
    assert "capacity goodput" in capsys.readouterr().out


def test_capacity_is_searched(tmp_path: Path):
    args = (*SIM, *GOODPUT, "--find_capacity", "--resolution=0.2")
    whole, _ = results(tmp_path, *args)
    found, runs = whole["capacity"], whole["runs"]
    held = [run for run in runs if run["slo_good"] >= 0.9 * run["slo_total"]]
    assert found["rate"] == max(run["request_rate"] for run in held)
    assert found["good"] / found["total"] >= 0.9 and found["total"] == 30
    worse = min(run["request_rate"] for run in runs if run not in held)
    assert found["rate"] <= found["interpolated"] < worse <= 1.2 * found["rate"]


def test_what_is_shed_counts_against_the_system(tmp_path: Path):
    args = ("--request_rate=inf", "--config.max_waiting=5", "--num_warmups=0")
    whole, lines = results(tmp_path, *SIM, *args, "--goodput=ttft:100000")
    assert whole["shed"] > 0 and whole["completed"] + whole["shed"] == 30
    assert whole["slo_total"] == 30 and whole["slo_attainment"] == whole["completed"] / 30
    assert whole["errors_by_reason"] == {"QueueFull": whole["shed"]}
    assert {line["finish_reason"] for line in lines} == {"length", "shed"}
    assert whole["request_rate"] == "inf"


def test_a_saved_workload_is_replayed_as_it_was(tmp_path: Path):
    saved = tmp_path / "saved.jsonl"
    _, first = results(tmp_path, *SIM, "--turns=1-3", f"--save_workload={saved}")
    assert len(read_workload(saved)) == len(first) - 1
    _, again = results(tmp_path, "--backend=sim", f"--workload=saved:{saved}")
    assert first == again


def test_the_first_requests_of_a_saved_workload_are_replayed(tmp_path: Path):
    """Without --num_prompts all are, whatever its default."""
    saved = tmp_path / "saved.jsonl"
    saved.write_text('{"moment": 0, "prompt": 8, "output": 2}\n' * 120)
    args = ("--backend=sim", f"--workload=saved:{saved}", "--num_warmups=0")
    assert results(tmp_path, *args)[0]["completed"] == 120
    assert results(tmp_path, *args, "--num_prompts=7")[0]["completed"] == 7


def test_ids_of_a_saved_workload_may_have_any_sign(tmp_path: Path):
    saved = tmp_path / "saved.jsonl"
    ids = ["a#1", "a#2", "#", "a#0#0"]
    lines = [{"moment": 0, "prompt": 8, "output": i, "id": id} for i, id in enumerate(ids, 1)]
    lines.append({"moment": 0, "prompt": 8, "output": 5, "id": "b#", "after": "a#1"})
    saved.write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole, records = results(
        tmp_path, "--backend=sim", f"--workload=saved:{saved}", "--num_warmups=0"
    )
    assert whole["completed"] == 5, whole["errors_by_reason"]
    assert [record["output_len"] for record in records] == [1, 2, 3, 4, 5]


def test_stamps_of_a_simulation_are_of_its_virtual_clock(tmp_path: Path):
    _, lines = results(tmp_path, *SIM, "--num_warmups=2")
    warm = max(line["metadata"]["request_end_ns"] for line in lines[:2])
    assert all(line["metadata"]["request_start_ns"] >= warm for line in lines[2:])


def test_requests_with_slos_of_their_own_are_held_against_those(tmp_path: Path):
    saved = tmp_path / "saved.jsonl"
    wishes = [{"ttft": 1e-6}, {"ttft": 9.0}, {"tpot": 9.0}, None]
    lines = [
        {"moment": i, "prompt": 8, "output": 3} | ({} if wish is None else {"slo": wish})
        for i, wish in enumerate(wishes)
    ]
    saved.write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = ("--backend=sim", f"--workload=saved:{saved}", "--num_warmups=0")
    whole, records = results(tmp_path, *args)
    assert [record["good"] for record in records] == [False, True, True, None]
    assert (whole["slo_good"], whole["slo_total"], whole["slo"]) == (2, 3, None)
    # What a request does not bound is held against the bounds of the command.
    whole, records = results(tmp_path, *args, "--goodput=tpot:1")
    assert [record["good"] for record in records] == [False, False, True, False]
    assert records[1]["slo"] == {"ttft": 9e3, "tpot": 1.0, "itl": None, "e2el": None}
    # Rates can be compared by the requests' own SLOs alone.
    whole, _ = results(tmp_path, *args, "--rates=1,2", "--share=0.5")
    assert (whole["capacity"]["good"], whole["capacity"]["total"]) == (2, 3)


def test_a_trace_is_replayed_at_its_own_rate_or_another(tmp_path: Path):
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 100 * i, "input_length": 700, "output_length": 5, "hash_ids": [0, i + 1]}
        for i in range(20)
    ]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = ("--backend=sim", f"--workload=mooncake:{trace}", "--config.kv.prefix_cache")
    whole, records = results(tmp_path, *args)
    assert whole["request_rate"] == pytest.approx(10) and whole["completed"] == 20
    assert all(line["cached_len"] == 512 for line in records[3:])
    whole, _ = results(tmp_path, *args, "--time_scale=0.5", "--num_prompts=10")
    assert whole["request_rate"] == pytest.approx(20) and whole["completed"] == 10
    whole, records = results(tmp_path, *args, "--request_rate=2", "--context=600")
    assert whole["request_rate"] == pytest.approx(2)
    assert {line["input_len"] for line in records} == {595}


def test_a_mix_draws_both_lengths_together(tmp_path: Path):
    _, lines = results(tmp_path, *SIM[:2], "--mix=1/300/4", "--mix=2/50/20", "--prefix_len=32")
    pairs = {(line["input_len"], line["output_len"]) for line in lines}
    assert pairs == {(332, 4), (82, 20)}


@pytest.mark.parametrize("more", [(), ("--max_concurrency=2",), ("--turns=2", "--think_s=0.01")])
def test_a_model_on_devices_is_driven(more: tuple[str, ...], tmp_path: Path, capsys):
    """Compiles two layers of 16 numbers: a second or two."""
    config = tmp_path / "tiny.py"
    config.write_text(TINY)
    rate = () if more[:1] == ("--max_concurrency=2",) else ("--request_rate=100",)
    args = (f"--config={config}", "--num_prompts=5", "--input_len=4-12", "--output_len=1-4")
    before = unix_ns()
    whole, lines = results(tmp_path, *args, *more, *rate, "--turn_input_len=2", *GOODPUT)
    after = unix_ns()
    count = 10 if more[:1] == ("--turns=2",) else 5
    assert whole["completed"] == len(lines) - 1 == count, whole["errors_by_reason"]
    assert [line["number"] for line in lines[1:]] == list(range(count))
    for line in lines[1:]:
        assert line["ttft_ms"] > 0 and line["late_ms"] >= 0
        assert line["queue_ms"] >= line["late_ms"] - 1e-6  # its clock began when it was due
        assert line["output_len"] == len(line["itls_ms"]) + 1
        told = line["metadata"]
        assert before < told["request_start_ns"] < told["request_end_ns"] < after
    assert whole["engines"]["prefill/0"]["steps"] >= 1 and whole["endpoint_type"] == "pdjax"
    assert whole["total_output_tokens"] == sum(line["output_len"] for line in lines[1:])
    assert "TTFT" in capsys.readouterr().out


def test_a_request_that_nothing_can_serve_is_a_failure_and_not_a_hole(tmp_path: Path):
    config = tmp_path / "tiny.py"
    config.write_text(TINY)
    saved = tmp_path / "saved.jsonl"
    saved.write_text(
        '{"moment": 0, "prompt": 70, "output": 2, "id": "a"}\n'
        '{"moment": 0, "prompt": 3, "output": 2, "id": "b", "after": "a"}\n'
        '{"moment": 0, "prompt": 3, "output": 2, "id": "c"}\n'
    )
    args = (f"--config={config}", f"--workload=saved:{saved}", "--context=100", "--num_warmups=0")
    whole, lines = results(tmp_path, *args, "--goodput=ttft:100000")
    assert (whole["completed"], whole["failed"], whole["slo_total"]) == (1, 2, 3)
    assert "never sent: a" in lines[1]["error"] and lines[2]["error"] is None
    assert lines[0]["error"] and not lines[0]["good"]


def test_the_simulations_of_the_help_page_run(tmp_path: Path):
    found = re.findall("pdjax bench (--backend=sim .*)", cli.COMMANDS["bench"].usage)
    assert len(found) == 3
    for line in found:
        assert bench(*line.split(), f"--out={tmp_path / 'out.json'}") == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--goodput=speed:3"], "goodput='speed:3': must be one of ttft, tpot, itl, e2el"),
        (["--goodput=ttft"], "goodput='ttft': must be"),
        (["--rates=1,2"], "goodput: must say what makes a request good"),
        (["--rates=1,x", *GOODPUT], "rates=1,x: must be numbers"),
        (["--rates=0", *GOODPUT], "rates=0: must be more than 0"),
        (["--rates=1", "--find_capacity", *GOODPUT], "rates: must not be given with"),
        (["--find_capacity", "--max_concurrency=2", *GOODPUT], "max_concurrency: a closed loop"),
        (["--find_capacity", "--request_rate=inf", *GOODPUT], "request_rate=inf: a search"),
        (["--share=2", "--rates=1", *GOODPUT], "share=2.0: must be in"),
        (["--share=0.5"], "share=0.5: changes nothing without rates or find_capacity"),
        (["--resolution=0", "--find_capacity", *GOODPUT], "resolution=0.0: must be more than 0"),
        (["--resolution=0.1", "--rates=1", *GOODPUT], "resolution=0.1: changes nothing without fi"),
        (["--costs=v5e"], "costs='v5e': must be one of h100, h200"),
        (["--costs=h200", "--config=llama3_8b", "--config.prefill.tp=2"], "prefill.tp=2: must be"),
        (["--costs=h200", "--backend=device"], "costs=h200: changes nothing without backend=sim"),
        (["--costs=h200", "--url=http://x"], "costs=h200: changes nothing without backend=sim"),
        (["--model=m"], "model=m: changes nothing without url"),
        (["--vocab_size=9"], "vocab_size=9: changes nothing without url"),
        (["--api_key_file=x"], "api_key_file=x: changes nothing without url"),
        (["--timeout_s=9"], "timeout_s=9.0: changes nothing without url"),
        (["--num_gpu=9"], "num_gpu=9: changes nothing without url"),
        (["--num_prompts=0"], "num_prompts=0: must be at least 1"),
        (["--num_warmups=-1"], "num_warmups=-1: must be 0 or more"),
        (["--request_rate=0"], "rate=0.0: must be more than 0"),
        (["--max_concurrency=2", "--request_rate=3"], "max_concurrency=2: is of a closed loop"),
        (["--time_scale=2"], "time_scale=2.0: is of a file"),
        (["--workload=burst:x"], "workload='burst:x': must be one of saved, mooncake, azure"),
        (["--workload=saved:no_such_file"], "no_such_file"),
        (["--workload=saved:x", "--seed=3"], "seed=3: changes nothing of workload=saved:FILE"),
        (["--workload=saved:x", "--spread_s=3"], "spread_s=3.0: changes nothing of workload=saved"),
        (["--workload=azure:x", "--spread_s=3"], "spread_s=3.0: changes nothing of workload=azure"),
        (["--workload=mooncake:x", "--input_len=3"], "input_len=3: changes nothing of workload=mo"),
        (["--spread_s=3"], "spread_s=3.0: changes nothing of a workload that is drawn"),
        (["--mix=1/2"], "mix='1/2': must be as 0.8/100-300/50"),
        (["--turns=2", "--prefix_len=3"], "turns: conversations have neither"),
        (["--context=1"], "context=1: must be at least 2"),
        (["--context=40", "--nocut"], "workload: no request fits into 40 tokens"),
        (["--metadata=x"], "metadata='x': must be KEY=VALUE"),
        (["--out="], "out='': must name a file"),
        (["--url=ftp://x"], "url='ftp://x': must be as http://"),
        (["--url=http://127.0.0.1:1"], "Connect call failed"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags: list[str], message: str, tmp_path: Path, capsys):
    assert bench("--backend=sim", f"--out={tmp_path / 'out.json'}", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_costs_of_another_model_are_refused(tmp_path: Path, capsys):
    config = tmp_path / "tiny.py"
    config.write_text(TINY)
    args = (f"--config={config}", "--costs=h200", f"--out={tmp_path / 'out.json'}")
    assert bench("--backend=sim", *args) == 2
    assert "model.spec: vocab_size=101, but the calibration h200 is" in capsys.readouterr().err


def test_costs_without_a_link_are_those_of_colocated_engines(tmp_path: Path, capsys):
    measured = json.loads(
        (Path(calibration.__file__).parent / "calibrations/h200.json").read_text()
    )
    del measured["link"]
    (path := tmp_path / "steps.json").write_text(json.dumps(measured))
    args = (*SIM, "--config=llama3_8b", f"--costs={path}", f"--out={tmp_path / 'out.json'}")
    assert bench(*args) == 2
    assert "does not say what the link between two chips can do" in capsys.readouterr().err
    assert bench(*args, "--config.colocated") == 0
    assert json.loads((tmp_path / "out.json").read_text())["costs"]["link"] is None


def test_constant_arrivals_are_written_as_a_string(tmp_path: Path):
    whole, _ = results(tmp_path, *SIM, f"--burstiness={math.inf}")
    assert whole["burstiness"] == "inf"
