"""AsyncLLM as the backend: over fake engines, drains and full queues; on real engines of a tiny
model, tokens through HTTP that are those of `LLM.generate`."""

import asyncio
from typing import Any

import httpx2
import pytest

from pdjax import async_llm
from pdjax.async_llm import AsyncLLM
from pdjax.config import Config, ModelConfig
from pdjax.serving.app import make_app
from pdjax.serving.async_backend import AsyncBackend
from pdjax.serving.front import Front, Settings
from tests.helpers.deployment import CONFIG
from tests.helpers.fake_backend import Served, served
from tests.helpers.house import House, text_house
from tests.helpers.promise import disaggregated, workload
from tests.helpers.text_llm import TextLLM


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> House:
    house = text_house()
    llm = TextLLM(house, tokenizer=None)
    monkeypatch.setattr(async_llm, "LLM", lambda *_, **__: llm)
    return house


def backend() -> AsyncBackend:
    return AsyncBackend(AsyncLLM(CONFIG), "tiny")


def body(number: int, **more: Any) -> dict[str, Any]:
    greedy = {"temperature": 0, "max_tokens": 20, "ignore_eos": True, "return_token_ids": True}
    return {"prompt": [1 + number % 9, 2, 3], **greedy, **more}


def test_the_state_of_fakes_is_told(house: House):
    async def ask() -> dict[str, Any]:
        front = Front(backend(), Settings())
        transport = httpx2.ASGITransport(make_app(front))
        async with httpx2.AsyncClient(transport=transport, base_url="http://here") as client:
            answer = await client.post("/v1/completions", json=body(1))
            assert answer.status_code == 200, answer.text
            assert "pdjax:num_requests_running" in (await client.get("/metrics")).text
            state = (await client.get("/engines")).json()
            state |= (await client.get("/requests")).json()
        await front.close()
        return state

    state = asyncio.run(ask())
    [told] = state["requests"]
    assert (told["finish_reason"], told["input_len"], told["output_len"]) == ("length", 3, 20)
    assert [each["target"] for each in told["shipments"]] == ["decode/0"]
    assert set(state["engines"]) == {"prefill/0", "decode/0"}
    assert state["queue"] == {"waiting": 0, "running": 0, "max_waiting": 4}
    assert state["engines"]["decode/0"]["steps"] > 0
    for pool in state["pools"].values():
        assert pool["free_pages"] + pool["used_pages"] == pool["pages"]


def test_a_drain_lets_answers_finish_and_has_an_end(house: House):
    coordinator = house.deployment.coordinator
    drain = Settings(drain_s=0.3)
    with served(backend, drain) as at, httpx2.Client(base_url=at.url, timeout=20) as client:
        assert client.post("/v1/completions", json=body(0)).status_code == 200
        coordinator.pause(house.deployment.decode[0].id)
        with client.stream("POST", "/v1/completions", json=body(1, stream=True)) as response:
            pieces = response.iter_raw()
            next(pieces)
            at.tell_to_end()
            at.until(lambda: at.front.is_draining)
            with httpx2.Client(base_url=at.url) as other:
                assert other.post("/v1/completions", json=body(2)).status_code == 503
                assert other.get("/health").status_code == 200
            told: list[bytes] = []
            with pytest.raises(httpx2.RemoteProtocolError):
                told.extend(pieces)
            assert b"shutting down" in b"".join(told)
    house.check()


def test_a_full_queue_refuses_and_says_when_to_come_again(house: House):
    coordinator, engine = house.deployment.coordinator, house.deployment.decode[0].id
    with served(backend) as at:
        coordinator.pause(engine)

        async def crowd() -> list[httpx2.Response]:
            async with httpx2.AsyncClient(base_url=at.url, timeout=20) as client:
                asked = [
                    asyncio.ensure_future(client.post("/v1/completions", json=body(i)))
                    for i in range(30)
                ]
                await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
                coordinator.resume(engine)
                coordinator.wake()
                return await asyncio.gather(*asked)

        responses = asyncio.run(crowd())
        refused = [each for each in responses if each.status_code == 429]
        assert refused and {each.status_code for each in responses} == {200, 429}
        for each in refused:
            assert each.headers["retry-after"] == "1"
            assert each.json()["error"]["code"] == "rate_limit_exceeded"
    house.check()


def serve_tiny(at: Served, prompts: list[Any], params: list[Any]) -> list[list[list[int]]]:
    """The token ids of each choice of each prompt, through HTTP, streamed where its number is
    odd."""

    async def ask(client: httpx2.AsyncClient, number: int) -> list[list[int]]:
        p, streams = params[number], number % 2 == 1
        asked = {
            **{name: getattr(p, name) for name in ("temperature", "top_p", "top_k", "min_p", "n")},
            **{name: getattr(p, name) for name in ("seed", "max_tokens", "ignore_eos")},
            "repetition_penalty": p.repetition_penalty,
            "frequency_penalty": p.frequency_penalty,
            "stop_token_ids": list(p.stop_token_ids),
            "min_tokens": p.min_tokens,
            "logit_bias": {str(token): value for token, value in p.logit_bias.items()},
            "allowed_token_ids": p.allowed_token_ids and list(p.allowed_token_ids),
        }
        asked |= {"prompt": prompts[number], "return_token_ids": True, "stream": streams}
        response = await client.post("/v1/completions", json=asked)
        assert response.status_code == 200, response.text
        found: list[list[int]] = [[] for _ in range(p.n)]
        for chunk in chunks(response.text) if streams else [response.json()]:
            for choice in chunk["choices"]:
                found[choice["index"]] += choice["token_ids"]
        return found

    async def all_of_them() -> list[list[list[int]]]:
        async with httpx2.AsyncClient(base_url=at.url, timeout=120) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(len(prompts))))

    return asyncio.run(all_of_them())


def chunks(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [httpx2.Response(200, text=line).json() for line in lines[:-1]]


def test_tokens_through_http_are_those_of_generate():
    config = disaggregated(1, 2, 1)
    prompts, params = (list(each) for each in zip(*workload(), strict=True))
    llm = AsyncLLM(config)
    expected = [
        [choice.token_ids for choice in output.choices]
        for output in llm.llm.generate(prompts, params)
    ]
    with served(lambda: AsyncBackend(llm)) as at:
        assert serve_tiny(at, prompts, params) == expected


def test_a_model_of_a_file_has_only_its_name(house: House, tmp_path: Any):
    (tmp_path / "m.gguf").write_bytes(b"")

    async def name() -> str:
        made = AsyncLLM(CONFIG)
        made.llm.config = Config(model=ModelConfig(source=str(tmp_path / "m.gguf")))
        found = AsyncBackend(made).model.name
        await made.close()
        return found

    assert asyncio.run(name()) == "m"
