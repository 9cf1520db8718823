"""The roof: what a Python user touches, on real engines."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from pdjax.async_llm import AsyncLLM
from pdjax.async_stream import AsyncStream
from pdjax.config import Config, DecodeConfig, ModelConfig
from pdjax.core.request import SamplingParams
from pdjax.core.slo import SLO
from pdjax.llm import LLM
from pdjax.stream import StreamChunk
from tests.helpers.promise import COLD, MONOLITHIC, conserved, disaggregated, workload
from tests.helpers.real_model import CUT

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(disaggregated(1, 2, 1), COLD) as llm:
        yield llm


@pytest.fixture(scope="module")
def smollm2() -> Iterator[LLM]:
    with LLM("smollm2", CUT) as llm:
        yield llm


@pytest.mark.model
def test_greedy_tokens_of_the_real_model_are_those_of_transformers(smollm2: LLM):
    fixture = Path(__file__).parents[1] / "parity" / "fixtures" / "smollm2.json"
    cases = json.loads(fixture.read_text())["greedy"]
    params = [
        SamplingParams(temperature=0.0, max_tokens=len(continuation)) for _, continuation in cases
    ]
    outputs = smollm2.generate([prompt for prompt, _ in cases], params)
    assert [output.token_ids for output in outputs] == [continuation for _, continuation in cases]
    assert smollm2.recorder.transfers.layout_changing_puts == 0
    conserved(smollm2)


@pytest.mark.model
def test_chat_and_stream_show_the_same_text(smollm2: LLM):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    params = SamplingParams(temperature=0.0, max_tokens=16)
    [answer] = smollm2.chat(messages, params)
    assert answer.text == "The capital of France is Paris."
    assert (answer.finish_reason, answer.metrics.ttft > 0) == ("stop", True)

    chunks = list(smollm2.stream_chat(messages, params))
    assert "".join(chunk.text for chunk in chunks) == answer.text
    assert [token for chunk in chunks for token in chunk.token_ids] == answer.token_ids
    assert chunks[-1].output is not None
    assert chunks[-1].output.text == answer.text

    [stopped] = smollm2.chat(messages, replace(params, stop="France"))
    assert (stopped.text, stopped.stop_reason) == ("The capital of ", "France")


def test_log_probabilities_are_the_same_from_prefill_and_decode(llm: LLM):
    """The first token's come from the prefill mesh, the others' from the decode mesh: prefilling
    what was decoded must give the same."""
    params = replace(GREEDY, logprobs=3)
    [output] = llm.generate([[5, 6, 7]], params)
    assert output.logprobs is not None
    assert len(output.logprobs) == 8
    for i, entry in enumerate(output.logprobs):
        [again] = llm.generate([[5, 6, 7, *output.token_ids[:i]]], replace(params, max_tokens=1))
        assert again.logprobs is not None
        assert again.logprobs[0].chosen == pytest.approx(entry.chosen, abs=1e-4)
        assert [t for t, _ in again.logprobs[0].top] == [t for t, _ in entry.top]
        assert entry.top[0][0] == output.token_ids[i]
        assert entry.top[0][1] == pytest.approx(entry.chosen, abs=1e-6)


def test_a_seeded_request_is_the_same_alone_and_in_a_crowd(llm: LLM):
    params = SamplingParams(temperature=1.0, seed=77, max_tokens=10, ignore_eos=True)
    [alone] = llm.generate([[1, 2, 3, 4]], params)
    prompts, each = zip(*workload(), strict=True)
    crowd = llm.generate([*prompts, [1, 2, 3, 4]], [*each, params])
    assert crowd[-1].token_ids == alone.token_ids


class Letters:
    """Text of a letter a token, for a model without a tokenizer."""

    def __init__(self) -> None:
        self.text, self._new = "", ""

    def push(self, token: int) -> None:
        self._new += chr(ord("a") + token % 26)

    def take(self) -> str:
        new, self._new = self._new, ""
        self.text += new
        return new

    def finish(self) -> None:
        pass


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    monkeypatch.setattr(llm.coordinator, "_make_text", lambda request: Letters())


def broken(_: str) -> None:
    raise LookupError("on_text")


@pytest.mark.usefixtures("letters")
def test_a_callback_that_raises_hurts_only_its_own_request(llm: LLM):
    neighbours = [llm.submit([i, 2], GREEDY) for i in range(6)]
    victim = llm.submit([3, 2], GREEDY, on_text=broken)
    with pytest.raises(LookupError):
        conserved(llm)
    conserved(llm)
    answers = [llm.take_output(neighbour) for neighbour in neighbours]
    assert all(answer is not None and answer.finish_reason == "length" for answer in answers)
    ended = llm.take_output(victim)
    assert ended is not None
    assert ended.finish_reason == "abort"
    assert ended.error == "on_text: LookupError: on_text"


@pytest.mark.usefixtures("letters")
def test_a_callback_that_raises_does_not_end_an_innocent_generate(llm: LLM):
    victim = llm.submit([3, 2], GREEDY, on_text=broken)
    answers = llm.generate([[1, 2], [3, 4]], GREEDY)
    assert [answer.finish_reason for answer in answers] == ["length", "length"]
    ended = llm.take_output(victim)
    assert ended is not None and ended.error == "on_text: LookupError: on_text"
    with pytest.raises(LookupError):  # the loop of the one who submitted it
        llm.step()
    conserved(llm)


@pytest.mark.usefixtures("letters")
def test_a_callback_may_abort_and_submit_but_not_wait(llm: LLM):
    errors: list[Exception] = []

    def wait(_: str) -> None:
        for call in (llm.step, lambda: llm.generate([[1]], GREEDY)):
            try:
                call()
            except RuntimeError as error:
                errors.append(error)
        llm.abort(first)
        others.append(llm.submit([4], GREEDY))

    others: list[str] = []
    first = llm.submit([3, 2], GREEDY, on_text=wait)
    conserved(llm)
    assert [str(error)[:40] for error in errors] == ["on_text: called within a turn of this LL"] * 2
    answer = llm.take_output(first)
    assert answer is not None and answer.finish_reason == "abort"
    assert len(answer.token_ids) < 8
    [other] = map(llm.take_output, others)
    assert other is not None and other.finish_reason == "length"


def test_a_stream_that_is_dropped_is_aborted(llm: LLM):
    stream = llm.stream([1, 2, 3], GREEDY)
    assert next(stream).token_ids
    del stream
    llm.stream([1, 2, 3], GREEDY)  # never listened to
    conserved(llm)
    assert not llm.session.book.entries


def test_streams_of_asyncio_have_the_same_tokens_and_log_probabilities(llm: LLM):
    params = SamplingParams(temperature=1.0, n=2, seed=3, max_tokens=6, ignore_eos=True, logprobs=2)
    [alone] = llm.generate([[5, 6, 7]], params)

    async def read(stream: AsyncStream) -> dict[int, list[StreamChunk]]:
        of_choice: dict[int, list[StreamChunk]] = {0: [], 1: []}
        async for chunk in stream:
            of_choice[chunk.choice].append(chunk)
        return of_choice

    async def ask() -> None:
        async with AsyncLLM(llm.config, {"warm_up": False}) as asked:
            streams = [asked.stream([5, 6, 7], params), asked.stream([5, 6, 7], params, priority=1)]
            for chunks in await asyncio.gather(*map(read, streams)):
                for choice, whole in enumerate(alone.choices):
                    its = chunks[choice]
                    assert [t for chunk in its for t in chunk.token_ids] == whole.token_ids
                    assert whole.logprobs is not None
                    chosen = [entry.chosen for chunk in its for entry in chunk.logprobs or ()]
                    assert chosen == pytest.approx([e.chosen for e in whole.logprobs], abs=1e-4)
            [output] = await asked.generate([5, 6, 7], params, deadline=9.5, labels={"a": "b"})
            assert [c.token_ids for c in output.choices] == [c.token_ids for c in alone.choices]
            report = asked.report(SLO(ttft=600))
            assert (report["completed"], report["slo_attainment"]) == (6, 1)

    asyncio.run(ask())


def test_a_report_and_a_trace_are_written(llm: LLM, tmp_path: Path):
    llm.generate([[1, 2], [3]], GREEDY)
    report = json.loads(json.dumps(llm.report(SLO(ttft=1e-9))))
    assert report["completed"] >= 2 and report["slo_attainment"] == 0
    assert llm.report()["slo_attainment"] is None
    llm.write_trace(tmp_path / "new" / "trace.json")
    assert json.loads((tmp_path / "new" / "trace.json").read_text())["traceEvents"]


def test_a_stream_of_several_choices(llm: LLM):
    chunks = list(llm.stream([1, 2], SamplingParams(n=2, temperature=1.0, max_tokens=5)))
    output = chunks[-1].output
    assert output is not None
    for choice, whole in enumerate(output.choices):
        its = [token for chunk in chunks if chunk.choice == choice for token in chunk.token_ids]
        assert its == whole.token_ids


def test_a_chat_gives_its_template_what_it_was_given(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[Any, dict[str, Any]]] = []

    class Template:
        def apply_chat_template(self, conversation: Any, **given: Any) -> list[int]:
            seen.append((conversation, given))
            return [len(conversation)]

    monkeypatch.setattr(llm.requests, "tokenizer", Template())
    hello, again = {"role": "user", "content": "a"}, {"role": "user", "content": "b"}
    outputs = llm.chat(
        iter([[hello], iter([hello, again])]), GREEDY, tools=iter([{"name": "f"}]), documents=[]
    )
    assert [output.prompt_token_ids for output in outputs] == [[1], [2]]
    assert [conversation for conversation, _ in seen] == [[hello], [hello, again]]
    assert all(given["tools"] == [{"name": "f"}] for _, given in seen)
    assert seen[0][1]["documents"] == [] and seen[0][1]["chat_template"] is None


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[]], GREEDY, "prompt_token_ids=\\(\\): must have at least one token"),
        ([[101]], GREEDY, "101 is not a token id; allowed are 0 to 100"),
        ([[1] * 64], GREEDY, "64 tokens, but the context is 64"),
        ([[1], None], GREEDY, "prompt=None: must be text or a list of token ids"),
        (5, GREEDY, "prompts=5: must be text or token ids"),
        ("text", GREEDY, "has no tokenizer; give token ids"),
        ([[1]], {"n": 1}, "must be a SamplingParams"),
        ([[1]], [GREEDY, GREEDY], "params: 2 given for 1 prompts"),
        ([[1]], SamplingParams(logprobs=4), "logprobs=4: must be at most 3"),
        ([[1]], SamplingParams(stop="a"), "stop=\\('a',\\): the model has no tokenizer"),
    ],
)
def test_what_can_never_be_served_is_refused(llm: LLM, prompts, params, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, params)
    assert not llm.has_work


def test_numpy_token_ids_are_token_ids(llm: LLM):
    plain = llm.generate([[1, 2], [3]], GREEDY)
    arrays = llm.generate([np.array([1, 2]), np.array([3])], GREEDY)
    assert [output.token_ids for output in arrays] == [output.token_ids for output in plain]
    assert llm.generate(np.array([1, 2]), GREEDY)[0].token_ids == plain[0].token_ids


@pytest.fixture
def started() -> None:
    """JAX has started: a config cannot make the devices that it lacks."""
    jax.devices()


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"decode.tp": 5}, "^decode.tp=5: does not divide the model's 12 KV heads"),
        ({"decode.stages": 8, "decode.rows": 8}, "^decode.stages=8: must be between 1 and the n"),
        ({"prefill.tp": 12, "decode.tp": 6}, "devices: prefill engine 0 12, decode engine 0 6"),
        ({"decode.attention": "mosaic_tpu"}, "decode.attention='mosaic_tpu': on this platform"),
        ({"model.max_model_len": 65}, "model.max_model_len=65: the model's context is 64"),
        ({"decode.page_buckets": (8,)}, "the largest must hold the 16 pages of model.max"),
        ({"handoff.layer_groups": 9}, "^handoff.layer_groups=9: must be between 1 and"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_read(monkeypatch, overrides, message):
    monkeypatch.setattr("pdjax.device.builder.random_params", None)
    with pytest.raises(ValueError, match=message):
        LLM(replace(MONOLITHIC, colocated=False), overrides)


def test_a_family_that_is_unknown_is_named_as_a_field_of_the_config():
    assert MONOLITHIC.model.spec is not None
    spec = replace(MONOLITHIC.model.spec, family="lama")
    with pytest.raises(ValueError, match=r"^model.spec.family='lama': allowed are llama, mistral"):
        LLM(replace(MONOLITHIC, model=replace(MONOLITHIC.model, spec=spec)))


@pytest.mark.usefixtures("started")
def test_too_few_devices_are_told_before_a_model_is_opened():
    config = Config(model=ModelConfig("/no/such/model"), decode=DecodeConfig(stages=99, rows=99))
    message = "decode engine 0 99 make 100, but this process has .* give .* cpu_devices=100"
    with pytest.raises(ValueError, match=message):
        LLM(config)
