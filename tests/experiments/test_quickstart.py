"""The demo: when it submits, what it shows, and the run that it compares with."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from experiments.quickstart import __main__ as quickstart
from pdjax import LLM, SamplingParams
from pdjax.config.load import load_config
from pdjax.core.clock import VirtualClock

ROOT = Path(__file__).resolve().parents[2]


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
