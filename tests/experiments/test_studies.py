"""Experiments that play workloads to modes: each at its smallest size, simulated."""

import json
import shlex
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from experiments.attainment import __main__ as attainment
from experiments.burstiness import __main__ as burstiness
from experiments.chunk_size import __main__ as chunk_size
from experiments.common.points import met, pooled
from experiments.common.served import program
from experiments.fairness import __main__ as fairness
from experiments.latency_breakdown import __main__ as latency_breakdown
from experiments.pd_ratio import __main__ as pd_ratio
from experiments.rivals import __main__ as rivals
from experiments.rivals.kept import Kept
from experiments.slo_scale import __main__ as slo_scale
from pdjax.bench.modes import MODES
from pdjax.core.slo import SLO
from pdjax.flags import status
from tests.helpers import tiny_models
from tests.helpers.fake_backend import LENGTH, FakeBackend, served

SMALL = ("--input_len=600", "--output_len=6", "--requests=8", "--seeds=1")


def play(module: ModuleType, folder: Path, *args: str) -> dict[str, Any]:
    name = module.__name__.split(".")[1]
    command = [name, f"--out={folder}", *args]
    assert status(module.main, module.FLAGS, "", command) == 0
    whole = json.loads((folder / "results.json").read_text("utf-8"))
    page = (folder / "report.html").read_text("utf-8")
    assert page.startswith("<!doctype html>") and "simulated: NVIDIA H200" in page
    for chart in folder.glob("*.svg"):
        root = ElementTree.fromstring(chart.read_text("utf-8"))
        assert "simulated" in (root.findtext("{http://www.w3.org/2000/svg}title") or "")
    assert whole["hardware"] == "simulated: NVIDIA H200" and whole["seeds"] == [0]
    assert whole["config"]["kv"]["prefix_cache"] is True and whole["sources"]
    return whole


def test_attainment(tmp_path: Path):
    args = (*SMALL, "--rates=4,4000", "--resolution=2", "--records", "--ttft=20", "--tpot=20")
    whole = play(attainment, tmp_path, *args)
    points = {(p["mode"], p["rate"]): p for p in whole["points"]}
    assert set(points) == {(mode, rate) for mode in MODES for rate in (4, 4000)}
    for mode in MODES:
        easy, hard = points[mode, 4], points[mode, 4000]
        assert easy["slo_good"] == easy["slo_total"] == 8 > hard["slo_good"]
    lines = (tmp_path / "records.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 8 * len(points) and json.loads(lines[0])["phase"] == "profiling"
    assert [each["mode"] for each in whole["capacities"]] == list(MODES)
    assert all(each["rate"] >= 4 and each["share"] == 0.9 for each in whole["capacities"])
    assert len(list(tmp_path.glob("*.svg"))) == 3


def test_the_same_command_writes_the_same_points(tmp_path: Path):
    args = (*SMALL, "--rates=20", "--nocapacity", "--modes=mixed", "--modes=disaggregated")
    first, second = (play(attainment, tmp_path / name, *args)["points"] for name in "ab")
    assert first == second and [p["mode"] for p in first] == ["mixed", "disaggregated"]


def test_engines_of_this_process_serve_as_simulated_ones_do(tmp_path: Path, capsys):
    args = ("--backend=engine", "--size=small", "--modes=disaggregated", "--rates=50")
    command = [
        "attainment",
        f"--out={tmp_path}",
        *args,
        "--requests=4",
        "--seeds=1",
        "--nocapacity",
    ]
    assert status(attainment.main, attainment.FLAGS, "", command) == 0
    whole = json.loads((tmp_path / "results.json").read_text("utf-8"))
    [point] = whole["points"]
    assert (point["completed"], point["slo_total"], point["num_gpu"]) == (4, 4, 2)
    assert whole["backend"] == "engine" and whole["costs"] is None
    assert "simulated" not in (tmp_path / "report.html").read_text("utf-8")


def test_a_server_is_driven_in_place_of_modes(tmp_path: Path):
    args = ["--label=fake", "--vocab_size=200", "--num_gpu=2", "--input_len=20", "--requests=4"]
    args += [f"--output_len={LENGTH}", "--rates=50", "--seeds=1", "--nocapacity"]
    backend = FakeBackend(tmp_path)
    with served(lambda: backend) as server:
        command = ["attainment", f"--url={server.url}", f"--out={tmp_path / 'out'}", *args]
        assert status(attainment.main, attainment.FLAGS, "", command) == 0
    whole = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    [point] = whole["points"]
    assert (point["mode"], point["completed"], point["num_gpu"]) == ("fake", 4, 2)
    assert whole["config"] is None and whole["hardware"] == f"a server at {server.url}"
    # It may refuse what it does not know.
    assert all(answer.ask.slo is None for answer in backend.answers)


def test_slo_scale(tmp_path: Path):
    whole = play(slo_scale, tmp_path, *SMALL, "--rate=40", "--scales=1,0.1,0.01")
    for mode in MODES:
        of = [p["slo_attainment"] for p in whole["points"] if p["mode"] == mode]
        assert all(a <= b for a, b in pairwise(of)) and of[0] == 0 and of[-1] == 1
    assert whole["predicted"]["attainment never rises as the scale falls"] is True


def test_chunk_size(tmp_path: Path):
    prefix = ("--prefix_len=256", "--prefix_groups=1", "--prefix_share=1")
    args = ("--budgets=128,512", "--rate=30", *prefix, "--nocapacity")
    whole = play(chunk_size, tmp_path, *SMALL, *args)
    found = [(p["mode"], p["budget"]) for p in whole["points"]]
    assert set(found) == {
        ("disaggregated", 2048),
        ("conditional", 2048),
        ("dynamic", 2048),
        *((mode, budget) for mode in ("colocated", "mixed") for budget in (128, 512)),
    }
    assert all(point["total_cached_tokens"] > 0 for point in whole["points"])
    first = {(p["mode"], p["budget"]): p["median_ttft_ms"] for p in whole["points"]}
    assert first["mixed", 128] > first["mixed", 512]


def test_pd_ratio(tmp_path: Path):
    args = ("--chips=3", "--kinds=600/4,64/32", "--resolution=9", "--requests=4")
    whole = play(pd_ratio, tmp_path, *args)
    assert [(p["kind"], p["prefill"], p["decode"]) for p in whole["points"]] == [
        *(("600/4", n, 3 - n) for n in (1, 2)),
        *(("64/32", n, 3 - n) for n in (1, 2)),
    ]
    assert whole["matched"]["600/4"] > whole["matched"]["64/32"] > 0


def test_latency_breakdown(tmp_path: Path):
    whole = play(latency_breakdown, tmp_path, *SMALL, "--rates=20", "--records")
    text = (tmp_path / "records.jsonl").read_text("utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    points = {point["set_up"]: point["parts_ms"] for point in whole["points"]}
    assert set(points) >= {*MODES, "KV in bulk", "link / 100, in bulk"}
    for name, parts in points.items():
        latencies = [line["e2el_ms"] for line in lines if line["set_up"] == name]
        assert sum(parts.values()) == pytest.approx(np.mean(latencies))
    exposed = "transfer, exposed"
    assert points["link / 100"][exposed] > points["disaggregated"][exposed]
    assert points["colocated"][exposed] == 0


def test_parts_of_a_server_are_the_first_token_and_the_rest():
    line = {"finish_reason": "length", "e2el_ms": 90.0, "ttft_ms": 30.0, "queue_ms": None}
    found = latency_breakdown.parts_of([line, {**line, "finish_reason": "error"}])
    assert found == {"first token": 30.0, "later tokens": 60.0}
    with pytest.raises(ValueError, match="none of 0 has completed"):
        latency_breakdown.parts_of([])


def test_burstiness(tmp_path: Path):
    whole = play(burstiness, tmp_path, *SMALL, "--rate=40", "--cvs=0.5,4")
    assert len(whole["points"]) == 2 * len(MODES)
    expected = {p["cv"]: p["kingman_ms"] for p in whole["waits"] if p["mode"] == "disaggregated"}
    assert expected[4] == pytest.approx(64 * expected[0.5])


def test_kingman():
    # A load of a half: half the service at CV 1 (M/D/1), and none below a server that keeps up.
    assert burstiness.kingman(10.0, 50.0, 1.0) == pytest.approx(5.0)
    assert burstiness.kingman(10.0, 100.0, 1.0) == np.inf


def test_fairness(tmp_path: Path):
    args = ("--seconds=0.5", "--input_len=2048", "--output_len=4", "--config.decode.rows=4")
    whole = play(fairness, tmp_path, *args)
    points = {(p["policy"], p["load"]): p for p in whole["points"]}
    assert set(points) == {(p, load) for p in ("fcfs", "fair") for load in ("both", "light")}
    assert points["fair", "both"]["light_requests"] == 8
    first = points["fair", "light"]["light_p90_ttft_ms"]
    assert first < points["fcfs", "light"]["light_p90_ttft_ms"]


def test_the_difference_in_service_is_of_the_time_in_which_both_wait():
    def line(tenant: str, due: float, first: float, gaps: int) -> dict[str, Any]:
        ttft = 1e3 * (first - due)
        return {"id": f"{tenant}0#0", "due_s": due, "ttft_ms": ttft, "itls_ms": [100.0] * gaps} | {
            "input_len": 10
        }

    # Both wait from 1 to 4; the heavy one's answer begins at 2, with a token each 0.1 s.
    records = [line("heavy", 0, 2, 4), line("light", 1, 4, 0), line("heavy", 0, 9, 0)]
    found = fairness.difference([*records, line("light", 9, 9.1, 0)], samples=901)
    assert found["moments"][-1] == pytest.approx(3.0, abs=0.02)
    assert found["most"] == 10 + 2 * 5 and found["apart"][0] == 0
    assert fairness.difference(records[:1])["most"] is None


def test_points_of_seeds_are_pooled():
    points = [
        {"mode": "a", "slo_good": good, "slo_total": 4, "seed": seed, "p90_ttft_ms": p90}
        for seed, (good, p90) in enumerate([(1, 10.0), (3, 20.0)])
    ]
    [found] = pooled(points, "mode")
    assert (found["slo_good"], found["slo_total"], found["slo_attainment"]) == (4, 8, 0.5)
    assert (found["p90_ttft_ms"], found["runs"]) == (15.0, 2) and "seed" not in found


def test_requests_are_held_against_any_bounds():
    line: dict[str, Any] = {"ttft_ms": 30.0, "tpot_ms": None, "itls_ms": [], "e2el_ms": 30.0}
    records = [{**line, "finish_reason": why} for why in ("length", "error", "shed", "abort")]
    assert met(records, SLO(ttft=0.03)) == (1, 3) and met(records, SLO(ttft=0.02)) == (0, 3)
    assert met(records, SLO(tpot=0.001, itl=0.001)) == (1, 3)


def test_rivals_go_on_where_they_stopped(tmp_path: Path, capsys):
    args = ("--rates=4,20", "--budgets=128", "--least_requests=6", "--seconds=0.1", *SMALL[:2])
    first = play(rivals, tmp_path, *args, "--systems=disaggregated", "--modes=disaggregated")
    assert [(p["system"], p["rate"]) for p in first["points"]] == [
        ("disaggregated", 4.0),
        ("disaggregated", 20.0),
    ]
    capsys.readouterr()
    whole = play(rivals, tmp_path, *args, "--modes=mixed", "--modes=disaggregated")
    said = capsys.readouterr().out
    assert "mixed@128 at 4/s" in said and "disaggregated at" not in said
    assert [each["system"] for each in whole["capacities"]] == ["disaggregated", "mixed@128"]
    assert len(list((tmp_path / "records").glob("*.jsonl"))) == 4
    command = ["rivals", f"--out={tmp_path}", "--ttft=5", *args]
    assert status(rivals.main, rivals.FLAGS, "", command) == 2
    assert "has points of a study with another config" in capsys.readouterr().err


def test_rivals_begin_no_point_that_does_not_fit_into_the_time(tmp_path: Path):
    whole = play(rivals, tmp_path, *SMALL, "--rates=4,20", "--seconds=0.001", "--modes=mixed")
    assert whole["left"] == []
    kept = Kept(tmp_path / "kept", {})
    args = ["rivals", f"--out={tmp_path / 'none'}", *SMALL, "--minutes=0.00001"]
    assert status(rivals.main, rivals.FLAGS, "", args) == 2
    assert kept.points() == [] and kept.start_s("vllm", 7.0) == 7.0


SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(json.dumps({"data": [{"id": "echo"}]}))

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        choice = {"text": "x", "finish_reason": None}
        told = [{"choices": [choice], "usage": {"completion_tokens": i + 1}}
                for i in range(asked["max_tokens"])]
        told[-1]["choices"] = [{"text": "x", "finish_reason": "length"}]
        events = [json.dumps(each) for each in told] + ["[DONE]"]
        self.answer("".join(f"data: {each}\\n\\n" for each in events))

    def answer(self, text):
        self.send_response(200)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass

HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_another_server_is_started_driven_and_ended(tmp_path: Path):
    (tmp_path / "server.py").write_text(SERVER)
    command = shlex.join([sys.executable, str(tmp_path / "server.py")]) + " {port}"
    args = (*SMALL, "--rates=50", f"--rival=echo={command}", "--systems=echo", "--vocab_size=100")
    whole = play(rivals, tmp_path / "out", *args)
    [point] = whole["points"]
    assert (point["system"], point["completed"], point["num_gpu"]) == ("echo", 8, 2)
    assert point["start_s"] > 0
    with (
        pytest.raises(ValueError, match="has ended with status 3"),
        program(f"{sys.executable} -c 'import sys; sys.exit(3)' {{port}}", vocab_size=9),
    ):
        pass
    with pytest.raises(ValueError, match=r"must have \{port\}"), program("sleep 1", vocab_size=9):
        pass


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        (attainment, ["--rates=0"], "rates=0: must be more than 0"),
        (attainment, ["--rates=x"], "rates=x: must be numbers"),
        (attainment, ["--requests=0"], "requests=0: must be at least 1"),
        (attainment, ["--seeds=0"], "seeds=0: must be at least 1"),
        (attainment, ["--costs=v5e"], "costs='v5e': must be one of h100, h200"),
        (attainment, ["--size=small"], "model.spec: vocab_size=512, but the calibration"),
        (slo_scale, ["--rate=-1"], "rate=-1.0: must be more than 0"),
        (chunk_size, ["--modes=disaggregated"], "modes=disaggregated: one must be of"),
        (chunk_size, ["--url=http://127.0.0.1:1"], "its steps have a budget"),
        (pd_ratio, ["--kinds=3"], "kinds=3: must be INPUT/OUTPUT"),
        (pd_ratio, ["--chips=1"], "chips=1: must be at least 2"),
        (pd_ratio, ["--modes=mixed"], "modes: must be disaggregated"),
        (fairness, ["--modes=mixed", "--modes=colocated"], "modes=mixed,colocated: must be one"),
        (rivals, ["--systems=tgi"], "systems=tgi: allowed are"),
        (rivals, ["--rival=mixed=x {port}"], "rival='mixed=x {port}': must be NAME=COMMAND"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    module: ModuleType, flags: list[str], message: str, tmp_path: Path, capsys
):
    command = ["experiment", f"--out={tmp_path / 'out'}", *flags]
    assert status(module.main, module.FLAGS, "", command) == 2
    assert message in capsys.readouterr().err


def test_the_report_says_what_several_seeds_come_to(tmp_path: Path):
    args = ("--input_len=600", "--output_len=6", "--requests=4", "--modes=mixed", "--seeds=2")
    command = ["slo_scale", f"--out={tmp_path}", *args]
    assert status(slo_scale.main, slo_scale.FLAGS, "", command) == 0
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "seeds 0 to 1, whose requests are counted together; latencies, their" in page
    assert "means over the seeds" in page


def test_a_model_of_a_checkpoint_is_held_against_the_costs(tmp_path: Path, capsys):
    """Its shapes are read from it, as a config without a model.spec does not say them."""
    source = tiny_models.write("llama", tmp_path / "model")
    config = tmp_path / "own.py"
    config.write_text(
        "from pdjax import Config\nfrom pdjax.config import ModelConfig\n"
        f"def get_config():\n    return Config(model=ModelConfig(source={str(source)!r}))\n"
    )
    command = ["attainment", f"--out={tmp_path / 'out'}", f"--config={config}"]
    assert status(attainment.main, attainment.FLAGS, "", command) == 2
    assert "but the calibration h200 is of llama3_8b" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
