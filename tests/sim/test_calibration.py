"""Calibrations: those that come along, files of bench_steps, and what is refused."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from experiments.common.shapes import MODELS
from pdjax.config.presets import LLAMA3_8B
from pdjax.core.model_spec import RopeSpec
from pdjax.core.moe_spec import MoeSpec
from pdjax.device.checkpoints.api import num_params
from pdjax.device.models.registry import kv_layout
from pdjax.sim.calibration import NAMES, Calibration
from pdjax.sim.links import Link

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", NAMES)
def test_those_that_come_along_fit_their_measurements(name: str):
    found = Calibration.load(name)
    found.check_model(LLAMA3_8B, "bfloat16", "bfloat16")
    assert max(abs(point.error) for point in found.points) < 0.04
    assert {"decode", "prefill"} <= set(found.worst)
    told = " ".join(found.validity())
    assert found.hardware in told and "Mixed steps were not measured" in told
    for source in found.sources:
        path = source.split(": ", 1)[1].split(",")[0]
        assert (ROOT / path).is_file(), source
    assert found.link is not None and found.memory_bytes is not None


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_the_measurements(name: str):
    """Each step of a calibration is in a file that it names."""
    found, known = Calibration.load(name), set()
    for source in found.sources:
        whole = json.loads((ROOT / source.split(": ", 1)[1].split(",")[0]).read_text())
        for kind in ("decode", "prefill"):
            known |= {(kind, row["case"], round(row["ms"], 4)) for row in whole.get(kind, ())}
    for point in found.points:
        assert (point.kind, point.case, round(point.measured * 1e3, 4)) in known


def test_memory_is_that_of_the_model():
    found = Calibration.load("h200")
    assert found.weights_bytes == 2 * (num_params(LLAMA3_8B) - 65 * 4096), "norms are left out"
    assert found.layout(64) == kv_layout(LLAMA3_8B, 64, "bfloat16")
    pages = found.pages(64, 0.9)
    assert pages is not None and pages * found.layout(64).page_bytes < 0.9 * (141e9 - 16e9)
    assert (found.with_memory(80e9).pages(64, 0.9) or 0) < pages
    with pytest.raises(ValueError, match="memory_gb=10: must be more than the weights take"):
        found.with_memory(10e9)


def results(**changes: Any) -> dict[str, Any]:
    whole = json.loads((ROOT / "experiments/measured/h100/bench_steps.json").read_text())
    spec = {name: getattr(LLAMA3_8B, name) for name in Calibration.load("h100").sizes}
    return {**whole, "spec": spec, **changes}


def test_a_model_with_experts(tmp_path: Path):
    """Its memory holds all experts, and its ticks read those that rows touch."""
    spec = MODELS["qwen3_30b_a3b"]
    assert isinstance(spec, MoeSpec)
    path = tmp_path / "bench_steps.json"
    path.write_text(json.dumps(results(spec=asdict(spec), model="qwen3_30b_a3b")))
    found = Calibration.load(str(path))
    norms = 48 * (2 * 2048 + 2 * 128) + 2048
    assert found.weights_bytes == 2 * (num_params(spec) - norms)
    assert found.costs.share_used == 1 / 16 and "experts" in " ".join(found.validity()).lower()
    found.check_model(spec, "bfloat16", "bfloat16")
    with pytest.raises(ValueError, match=r"model\.spec: experts_per_token=4, but .* with 8"):
        found.check_model(replace(spec, experts_per_token=4), "bfloat16", "bfloat16")
    assert found.spec(100) == replace(spec, context=100, rope=RopeSpec())


def test_a_file_of_bench_steps_is_one(tmp_path: Path):
    path = tmp_path / "bench_steps.json"
    mixed = [{"case": "64x1060/1x512", "ms": 15.0}]
    path.write_text(json.dumps(results(mixed=mixed)))
    found, known = Calibration.load(str(path)), Calibration.load("h100")
    assert found.costs.tick == pytest.approx(known.costs.tick, rel=1e-4)
    assert found.costs.mixed_scale != 1 and "mixed" in found.worst
    assert found.hardware == known.hardware and found.link is None and found.memory_bytes is None
    assert "commit b5997de" in found.sources[0]
    assert "Mixed steps were not measured" not in " ".join(found.validity())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decode": [{"case": "1x1060"}]}, "decode: must be objects with case and ms"),
        ({"decode": [{"case": "what", "ms": 1}]}, "must be ROWSxCONTEXT"),
        ({"decode": [{"case": "1x1060", "ms": 0}]}, "ms must be more than 0"),
        ({"prefill": []}, "prefill: 0 shapes were measured"),
        ({"memory_bytes": "80"}, "memory_bytes='80': must be a positive number"),
        ({"link": {"bandwidth": -1}}, "bandwidth=-1"),
        ({"link": {"speed": 1}}, "speed"),
    ],
)
def test_a_file_that_does_not_say_enough_is_refused(changes, message: str, tmp_path: Path):
    path = tmp_path / "steps.json"
    path.write_text(json.dumps(results(**changes)))
    with pytest.raises(ValueError, match=message) as caught:
        Calibration.load(str(path))
    assert str(caught.value).startswith(str(path))


def test_results_without_shapes_are_refused(tmp_path: Path):
    path = tmp_path / "old.json"
    path.write_text((ROOT / "experiments/measured/h100/bench_steps.json").read_text())
    with pytest.raises(ValueError, match="has no 'spec'"):
        Calibration.load(str(path))


def test_what_was_not_measured_is_refused():
    found = Calibration.load("h200")
    with pytest.raises(ValueError, match=r"costs='h300': must be one of h100, h200, or a file"):
        Calibration.load("h300")
    with pytest.raises(ValueError, match="vocab_size=151936, but the calibration h200 is of"):
        found.check_model(MODELS["qwen3_8b"], "bfloat16", "bfloat16")
    with pytest.raises(ValueError, match=r"model.dtype='float32': the calibration h200 is of"):
        found.check_model(LLAMA3_8B, "float32", "bfloat16")
    with pytest.raises(ValueError, match=r"decode.kv_dtype='int8'"):
        found.check_model(LLAMA3_8B, "bfloat16", "int8")


def test_a_link_that_is_given_stands_for_the_measured_one_and_its_source():
    measured = Calibration.load("h100")
    given = measured.with_link(Link(50e9, 2e-4))
    assert given.link == Link(50e9, 2e-4) and given.costs == measured.costs
    links = [each for each in given.sources if each.startswith("link")]
    assert links == ["link: as given, 50 GB/s after 0.2 ms"]
    assert len(given.sources) == len(measured.sources)
    again = given.with_link(Link(25e9, 0.0))
    assert again.sources[-1] == "link: as given, 25 GB/s after 0 ms"
    assert len(again.sources) == len(measured.sources)
