"""What experiments share: tables, workloads, shapes, origins of numbers, times of a step."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from experiments.bench_engine import __main__ as bench_engine
from experiments.bench_steps import __main__ as bench_steps
from experiments.common import origin as provenance
from experiments.common.config_fields import config_fields, define_config_fields
from experiments.common.figures import new_figure
from experiments.common.sequences import scattered_sequences
from experiments.common.shapes import LARGE, MODELS, chosen_model
from experiments.common.step_times import LABELS, PARTS, StepTimes
from experiments.common.tables import megabytes, number, percent, table
from experiments.common.workload import Workload
from experiments.handoff import __main__ as handoff
from experiments.interference import __main__ as interference
from pdjax import LLM
from pdjax.core.clock import VirtualClock
from pdjax.device.checkpoints.api import num_params
from pdjax.flags import new_flags, program_name, status
from pdjax.host.metrics.observer import Observer, TurnPart

ROOT = Path(__file__).resolve().parents[2]
WORK = Workload(batches=(1, 2), context=20, steps=4, prefill=64, rounds=1)


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


def test_a_number_says_where_it_comes_from():
    found = provenance.origin()
    assert found["versions"].keys() >= {"python", "jax", "numpy"}
    assert found["devices"]
    assert found["commit"] is None or len(found["commit"].rstrip("+")) == 40


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


def test_overrides_are_read_by_their_fields():
    values = new_flags()
    define_config_fields(values)
    assert config_fields(values) == {}
    arguments = ["--config.decode.rows=8", "--config.model.source=a=b"]

    def main() -> None:
        assert config_fields(values) == {"decode.rows": "8", "model.source": "a=b"}

    assert status(main, values, "", ["experiment", *arguments]) == 0


def test_sequences_have_pages_of_their_own_all_over_the_pool():
    first, second = scattered_sequences([5, 9], page_size=4, vocab=100, new_tokens=3)
    assert (len(first.pages), len(second.pages)) == (2, 3)
    assert sorted([*first.pages, *second.pages]) == [1, 2, 3, 4, 5]
    assert [*first.pages, *second.pages] != [1, 2, 3, 4, 5]
    assert len(second.request.prompt_token_ids) == 9


def test_a_figure_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"plot: needs matplotlib; pip install 'pdjax\[plot\]'"):
        new_figure(4, 3)


def test_results_are_saved_in_a_folder_that_is_made(tmp_path: Path, capsys):
    provenance.save({"a": 1}, str(tmp_path / "new/numbers.json"))
    assert json.loads((tmp_path / "new/numbers.json").read_text()) == {"a": 1}
    assert capsys.readouterr().out == f"saved {tmp_path}/new/numbers.json\n"


def test_a_package_is_named_by_its_folder():
    assert program_name("/x/experiments/handoff/__main__.py") == "handoff"
    assert program_name("/x/bin/pdjax") == "pdjax"
