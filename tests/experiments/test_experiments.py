"""The shared parts of experiments; every committed config loads."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from experiments.bench_cpu.__main__ import one_device, show
from experiments.bench_engine import __main__ as bench_engine
from experiments.bench_host import __main__ as bench_host
from experiments.bench_steps import __main__ as bench_steps
from experiments.common import origin as provenance
from experiments.common.shapes import LARGE, MODELS, chosen_model
from experiments.common.step_times import LABELS, PARTS, StepTimes
from experiments.common.tables import megabytes, number, percent, table
from experiments.common.workload import Numbers, Workload
from experiments.handoff import __main__ as handoff
from experiments.interference import __main__ as interference
from experiments.load_memory import __main__ as load_memory
from experiments.quickstart import __main__ as quickstart
from pdjax import LLM, SamplingParams
from pdjax.config.load import load_config
from pdjax.core.clock import VirtualClock
from pdjax.device.checkpoints.api import num_params
from pdjax.host.metrics.observer import Observer, TurnPart

ROOT = Path(__file__).resolve().parents[2]
WORK = Workload(batches=(1, 2), context=20, steps=4, prefill=64, rounds=1)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda f: f.stem)
def test_configs_load_and_say_how_to_run(file: Path):
    assert load_config(file).devices >= 1
    text = file.read_text("utf-8")
    assert "Run:" in text
    assert "Expect:" in text


def test_table_lines_columns_up():
    assert table(["", "ms"], [["a", "1.0"], ["long name", "12.5"]]).splitlines() == [
        "             ms",
        "---------  ----",
        "a           1.0",
        "long name  12.5",
    ]


def test_numbers_fit_their_column():
    assert [number(1234.56), number(2.0, 0), number(None)] == ["1,234.6", "2", "-"]
    assert [percent(0.125), percent(None)] == ["12%", "-"]
    assert megabytes(2_949_120) == "2.95"


@pytest.mark.parametrize("field", ["context", "steps", "prefill", "rounds"])
def test_workload_refuses_nothing_to_do(field: str):
    fields: dict[str, Any] = {"batches": (1,), "context": 1, "steps": 1, "prefill": 1, "rounds": 1}
    with pytest.raises(ValueError, match=f"{field}=0: must be at least 1"):
        Workload(**{**fields, field: 0})
    with pytest.raises(ValueError, match=r"batch=\[0\]: each must be at least 1"):
        Workload(**{**fields, "batches": (0,)})


def test_workload_cuts_another_prompt_for_each_row():
    first, second = WORK.prompts(list(range(100)), 2)
    assert first == list(range(20))
    assert second == list(range(5, 25))
    assert WORK.longest == 64


def test_bench_compares_what_both_computed():
    ours = Numbers(900.0, {1: 30.0, 2: 31.0}, {1: 32.0, 2: 33.0}, {1: [[1]], 2: [[1], [2]]})
    theirs = Numbers(700.0, {1: 40.0, 2: 41.0}, {}, {1: [[1]], 2: [[1], [3]]})
    lines = show(WORK, {"pdjax": ours, "transformers": theirs}).splitlines()
    assert lines[2].split()[-2:] == ["900", "700"]
    assert lines[5].endswith("1 of 1")
    assert lines[8].endswith("1 of 2")
    alone = show(WORK, {"pdjax": ours})
    assert "same tokens" not in alone


def test_bench_config_holds_its_workload():
    config = one_device(2, WORK)
    assert config.devices == 1
    assert config.decode.page_buckets is not None
    assert config.decode.page_buckets[-1] * config.kv.page_size >= WORK.longest


def test_the_rival_of_the_demo_is_one_device():
    config = load_config(ROOT / "configs/smollm2_cpu.py")
    alone = quickstart.monolithic(config)
    assert (config.devices, alone.devices) == (8, 1)
    assert alone.model == config.model
    assert alone.decode.rows == config.decode.rows


class FakeLLM:
    """Answers a request two steps after its arrival; each step takes 0.4 s."""

    def __init__(self) -> None:
        self.clock = VirtualClock(tick=0.4)
        self.came: dict[str, float] = {}

    def submit(self, prompt: list[int], params: SamplingParams, on_text: Any) -> str:
        request_id = f"r{prompt[0]}"
        self.came[request_id] = self.clock.now()
        if on_text is not None:
            on_text(f"text of {request_id}")
        return request_id

    @property
    def has_work(self) -> bool:
        return any(self.clock.now() < came + 0.8 for came in self.came.values())

    def step(self) -> None:
        self.clock.idle()

    def take_output(self, request_id: str) -> SimpleNamespace:
        return SimpleNamespace(request_id=request_id)


def test_demo_submits_when_a_question_arrives_and_shows_one():
    llm = FakeLLM()
    shown: list[str] = []
    questions = [quickstart.Question(at, "", shown=at == 1.0) for at in (0.0, 1.0, 3.0)]
    outputs = quickstart.serve(
        cast(LLM, llm), [[0], [1], [2]], [SamplingParams()] * 3, questions, shown.append
    )
    assert [output.request_id for output in outputs] == ["r0", "r1", "r2"]
    assert [round(came, 1) for came in llm.came.values()] == [0.0, 1.2, 3.2]
    assert shown == ["text of r1"]


def test_shapes_are_those_of_their_models():
    assert round(num_params(MODELS["llama3_8b"]) / 1e9, 2) == 8.03
    assert round(num_params(MODELS["qwen3_8b"]) / 1e9, 2) == 8.19
    assert round(num_params(MODELS["llama_1b"]) / 1e9, 2) == 1.24


@pytest.mark.parametrize("program", [bench_engine, bench_steps, handoff, interference])
def test_large_shapes_are_for_accelerators_unless_asked_for(program, monkeypatch, capsys):
    assert program.FLAGS["model"].default is None
    monkeypatch.setattr("jax.default_backend", lambda: "cpu")
    assert chosen_model(LARGE) == LARGE
    assert capsys.readouterr().out == ""
    assert chosen_model(None) == "tiny"
    assert capsys.readouterr().out.startswith("model: tiny, since JAX runs on the CPU; --model")
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert chosen_model(None) == LARGE


def test_the_chosen_shapes_have_room_for_what_is_asked():
    config = bench_engine.make_config("tiny", [bench_engine.Point(2, 1024, 128)], True, "x", {})
    spec = config.model.spec
    assert spec is not None and config.model.max_model_len is not None
    assert spec.context >= config.model.max_model_len >= 1024 + 128


def test_a_number_says_where_it_comes_from():
    found = provenance.origin()
    assert found["versions"].keys() >= {"python", "jax", "numpy"}
    assert found["devices"]
    assert found["commit"] is None or len(found["commit"].rstrip("+")) == 40


def test_an_export_knows_its_commit_and_a_copy_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(provenance, "ROOT", ROOT / "experiments")  # a copy within this checkout
    assert provenance.commit() is None
    monkeypatch.setattr(provenance, "EXPORTED", "f" * 40)
    assert provenance.commit() == "f" * 40
    assert (ROOT / ".gitattributes").read_text() == "experiments/common/origin.py export-subst\n"


def test_the_host_is_timed_while_every_row_decodes():
    coordinator = bench_host.decoding(rows=6, stages=2, prompt=5, steps=20)
    times = bench_host.step_seconds(coordinator, 20)
    assert len(times) == 20 and times == sorted(times)
    told = [len(coordinator.step()) for _ in range(4)]
    assert told == [3, 3, 3, 3]  # a microbatch a tick


POINT = bench_engine.Point(batch=2, prompt=20, output=6)


def test_parts_of_a_step_add_up_to_the_whole():
    """The clock moves by a second at each reading."""

    class Ticking(VirtualClock):
        def now(self) -> float:
            self.advance(1.0)
            return super().now()

    turn = [*PARTS, TurnPart.DISPATCH_DECODE]  # a part may come again
    coordinator = SimpleNamespace(observer=Observer())

    def step() -> None:
        coordinator.observer.turn_began()
        for part in turn:
            coordinator.observer.part_began(part)
        coordinator.observer.turn_ended(busy=TurnPart.WAIT not in turn)

    times = StepTimes(
        cast(LLM, SimpleNamespace(clock=Ticking(), coordinator=coordinator, step=step))
    )
    times.step()
    parts = times.per_step(1)
    assert list(parts) == list(LABELS)
    assert (parts["dispatch decode"], parts["admit"]) == (2e6, 1e6)
    assert (parts["news"], parts["polls"], parts["idle"]) == (2e6, 0, 0)
    turn.append(TurnPart.WAIT)
    times.step()
    both = times.per_step(1)
    assert (both["idle"], both["polls"]) == (1e6, 9e6)
    assert both["news"] == parts["news"] and both["admit"] == parts["admit"]


def test_bench_engine_measures_a_point(tmp_path: Path):
    cache = str(tmp_path)
    config = bench_engine.make_config("tiny", [POINT], True, cache, {"decode.lookahead": "0"})
    assert (config.decode.rows, config.decode.lookahead, config.devices) == (2, 0, 1)
    config = load_config(config, {"compilation_cache": None})  # keeps the other tests' setting
    with LLM(config) as llm:
        assert llm.coordinator.warm_up() == 4  # prefill, with penalties, decode, history
        served = bench_engine.measure(llm, StepTimes(llm), POINT, waves=2, rounds=1)
        with pytest.raises(ValueError, match=r"batch=9: with 26 tokens each needs 18 pages"):
            bench_engine.check_room(llm, bench_engine.Point(9, 20, 6))
    assert served.bare_ms > 0 and served.ratio > 0
    assert served.host_us["dispatch decode"] > 0
    assert served.total_tokens_per_s == pytest.approx(served.output_tokens_per_s * 26 / 6)
    starts = {"cold": {"engines_s": 1.0, "warm_up_s": 2.0}}
    point = {"batch": 2, "prompt": 20, "output": 6, "ratio": served.ratio, **vars(served)}
    lines = bench_engine.show({"points": [point], "starts": starts}).splitlines()
    assert lines[2].startswith("2 x 20 + 6")
    assert lines[-1].split() == ["cold", "1.0", "2.0"]


@pytest.mark.parametrize("kind", load_memory.FORMATS)
def test_load_memory_writes_models_that_load(kind: str, tmp_path: Path):
    spec = MODELS["tiny"]
    found = load_memory.load(str(load_memory.write_model(kind, spec, tmp_path)), "float32")
    vocabulary = 2 * spec.vocab_size * spec.model_dim  # embedding and output, the largest two
    assert found["largest"] == 4 * vocabulary
    assert found["weights"] > found["largest"]
