"""An LLM goes on, rightly, whatever its users and its devices do to it: real engines, which donate
their pools. `experiments.hostile` does the same at its size."""

import gc
import random
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from experiments.hostile import faults
from pdjax import LLM
from pdjax.device.kept.ahead import Compiling
from pdjax.device.kept.program import KeptProgram
from pdjax.host.coordinator import Coordinator
from pdjax.session import Closed


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(faults.CONFIG) as llm:
        yield llm


@pytest.fixture(scope="module")
def truth(llm: LLM) -> list[list[int]]:
    return faults.answers(llm)


def test_a_signal_in_generate_hurts_nobody_who_comes_later(llm: LLM, truth: list[list[int]]):
    draw = random.Random(1)
    hits = 0
    for _ in range(60):  # on a busy machine many come too late
        hits += faults.signal_once(llm, draw)
        assert faults.is_whole(llm, truth)
        if hits == 3:
            break
    assert hits > 0


def test_an_interrupt_out_of_any_line_of_the_host_leaks_nothing(llm: LLM, truth: list[list[int]]):
    hit, right = faults.lines(llm, 16, truth, random.Random(2))
    assert hit > 8 and right == 16


def test_a_device_that_fails_after_it_was_given_the_pool_begins_anew(
    llm: LLM, truth: list[list[int]]
):
    engines = llm.engines
    before = sum(engine.losses for engine in engines)
    assert faults.losses(llm, len(faults.DONATING), truth) == (4, 4)
    assert sum(engine.losses for engine in engines) - before >= 4


def test_threads_get_exact_answers(llm: LLM, truth: list[list[int]]):
    assert faults.threads(llm, 8, 3, truth) == (24, 24)


def test_a_stream_and_a_generate_in_two_threads(llm: LLM, truth: list[list[int]]):
    streamed: list[int] = []

    def read() -> None:
        for chunk in llm.stream(faults.prompts()[3], faults.PARAMS):
            streamed.extend(chunk.token_ids)

    reader = threading.Thread(target=read)
    reader.start()
    assert faults.answers(llm) == truth
    reader.join()
    assert streamed == truth[3]


def test_an_iterator_of_prompts_loses_none(llm: LLM, truth: list[list[int]]):
    generated = llm.generate((prompt for prompt in faults.prompts()), faults.PARAMS)
    assert [output.token_ids for output in generated] == truth
    [alone] = llm.generate(iter(faults.prompts()[1]), faults.PARAMS)
    assert alone.prompt_token_ids == faults.prompts()[1]
    assert alone.token_ids == truth[1]


def test_close_is_final_and_frees_the_devices_memory_without_the_collector():
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    gc.disable()
    try:
        llm = LLM(faults.CONFIG, {"warm_up": False})
        pending = llm.submit([1, 2, 3], faults.PARAMS)
        engine = weakref.ref(llm.engines[-1])
        llm.close()
        llm.close()
        left = [array for array in jax.live_arrays() if id(array) not in before]
        assert sum(array.nbytes for array in left) < 1 << 12, [array.shape for array in left]
        for call in (llm.generate, llm.stream, llm.submit):
            with pytest.raises(Closed):
                call([1, 2])
        assert llm.take_output(pending) is None and not llm.has_work
        assert engine() is not None
    finally:
        gc.enable()


def test_an_llm_that_fails_half_way_leaves_no_device_memory(monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    gc.disable()
    try:
        monkeypatch.setattr(Coordinator, "warm_up", interrupt)
        with pytest.raises(KeyboardInterrupt):
            LLM(faults.CONFIG)
        left = [array for array in jax.live_arrays() if id(array) not in before]
        assert sum(array.nbytes for array in left) < 1 << 12, [array.shape for array in left]
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_start_that_ends_while_programs_compile_leaves_no_thread_and_no_device_memory(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
):
    begun, go = list[object](), threading.Event()

    def compile_slowly(program: KeptProgram, *_: object) -> None:
        begun.append(program)
        go.wait(60)
        raise error("while it compiles")  # an interrupt comes to the thread that waits

    def interrupt(_: Compiling) -> None:
        raise KeyboardInterrupt

    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    gc.disable()
    try:
        monkeypatch.setattr(KeptProgram, "_made", compile_slowly)
        if error is KeyboardInterrupt:
            monkeypatch.setattr(Compiling, "result", interrupt)
        threading.Timer(1, go.set).start()
        with pytest.raises(error):
            LLM(faults.CONFIG, {"max_logprobs": 9})  # which no other test has
        assert not [each for each in threading.enumerate() if each.name == "pdjax compile"]
        assert begun
        left = [array for array in jax.live_arrays() if id(array) not in before]
        assert sum(array.nbytes for array in left) < 1 << 12, [array.shape for array in left]
    finally:
        gc.enable()


def test_params_that_are_none_are_refused(llm: LLM):
    params: Any = 5
    with pytest.raises(ValueError, match="params=5: must be a SamplingParams, a list"):
        llm.generate([1, 2], params)
