"""The official client against a server over a fake backend: what it sends is understood, and what
it gets it understands."""

import asyncio
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.helpers.fake_backend import LENGTH, TEXT, FakeBackend, Served

pytestmark = pytest.mark.smoke

HELLO: Any = [{"role": "user", "content": "hello"}]


def test_a_chat_is_answered_through_the_template(client: OpenAI, backend: FakeBackend):
    turns: Any = [
        {"role": "developer", "content": "be kind"},
        *HELLO,
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    answer = client.chat.completions.create(model="fake", messages=turns)
    assert backend.prompt == "<system>be kind<user>hello<assistant>yes?<user>a\nb<assistant>"
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", TEXT)
    assert (choice.finish_reason, answer.object) == ("stop", "chat.completion")
    assert answer.usage is not None and answer.usage.completion_tokens == LENGTH
    assert backend.asked.params.max_tokens == 4096 - len(backend.asked.prompt_token_ids)


def test_parameters_reach_the_sampler(client: OpenAI, backend: FakeBackend):
    client.chat.completions.create(
        model="fake",
        messages=HELLO,
        temperature=0.5,
        top_p=0.9,
        seed=-1,
        max_completion_tokens=7,
        max_tokens=99,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        stop=["x", "y"],
        user="u1",
        extra_body={
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.5,
            "ignore_eos": True,
            "stop_token_ids": [3],
        },
    )
    params = backend.asked.params
    assert (params.temperature, params.top_p, params.seed) == (0.5, 0.9, 2**64 - 1)
    assert (params.max_tokens, params.presence_penalty, params.frequency_penalty) == (7, 0.25, -0.5)
    assert (params.stop, params.stop_token_ids, params.ignore_eos) == (("x", "y"), (3,), True)
    assert (params.top_k, params.min_p, params.repetition_penalty) == (5, 0.1, 1.5)
    assert backend.asked.labels["user"] == "u1"


def test_a_streamed_chat_has_a_token_a_chunk_and_usage_last(client: OpenAI):
    chunks = list(
        client.chat.completions.create(
            model="fake", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )
    *tokens, last = chunks
    assert len(tokens) == LENGTH
    assert tokens[0].choices[0].delta.role == "assistant"
    assert "".join(each.choices[0].delta.content or "" for each in tokens) == TEXT
    assert [each.choices[0].finish_reason for each in tokens] == [None] * (LENGTH - 1) + ["stop"]
    assert last.choices == [] and last.usage is not None
    assert last.usage.completion_tokens == LENGTH
    assert {each.object for each in chunks} == {"chat.completion.chunk"}
    assert len({each.id for each in chunks}) == 1


def test_the_stream_helper_makes_the_whole_of_it(client: OpenAI):
    with client.chat.completions.stream(model="fake", messages=HELLO) as stream:
        stream.until_done()
        assert stream.get_final_completion().choices[0].message.content == TEXT


def test_continuous_usage_is_in_every_chunk(client: OpenAI):
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.completions.create(model="fake", prompt="hi", stream=True, stream_options=options)
    )
    counts = [each.usage.completion_tokens for each in chunks if each.usage is not None]
    assert counts == [*range(1, 17), 16]


def test_several_choices_and_prompts_have_their_own_indices(client: OpenAI):
    answer = client.completions.create(
        model="fake", prompt=["one", "two"], n=2, temperature=1.0, max_tokens=100
    )
    assert [each.index for each in answer.choices] == [0, 1, 2, 3]
    assert [each.text for each in answer.choices] == [TEXT, TEXT + "!"] * 2
    texts = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(
        model="fake", prompt=["one", "two"], n=2, temperature=1.0, max_tokens=100, stream=True
    ):
        [choice] = chunk.choices
        texts[choice.index] += choice.text
    assert [*texts.values()] == [TEXT, TEXT + "!"] * 2


def test_prompts_may_be_token_ids_and_are_echoed(client: OpenAI, backend: FakeBackend):
    ids = backend.bytes.encode("hé")
    for prompt in ("hé", ["hé"], ids, [ids]):
        made = client.completions.create(model="fake", prompt=prompt, echo=True, max_tokens=2)
        assert made.choices[0].text == "hé" + "Gr"
        assert made.choices[0].finish_reason == "length"
        chunks = list(
            client.completions.create(
                model="fake", prompt=prompt, echo=True, max_tokens=2, stream=True
            )
        )
        assert [chunk.choices[0].text for chunk in chunks] == ["hé" + "G", "r"]


def test_stop_strings_end_the_text_before_them(client: OpenAI):
    for stop in ("How", ["zz", "How"]):
        made = client.completions.create(model="fake", prompt="x", stop=stop, max_tokens=99)
        assert made.choices[0].text == "Grüße, 世界! "
        assert (made.choices[0].finish_reason, made.choices[0].stop_reason) == ("stop", "How")  # type: ignore[attr-defined]
        pieces = client.completions.create(
            model="fake", prompt="x", stop=stop, max_tokens=99, stream=True
        )
        assert "".join(each.choices[0].text for each in pieces) == "Grüße, 世界! "


def test_log_probabilities_in_both_forms(client: OpenAI):
    chat = client.chat.completions.create(
        model="fake", messages=HELLO, logprobs=True, top_logprobs=2, max_tokens=2
    )
    entries = chat.choices[0].logprobs
    assert entries is not None and entries.content is not None
    first = entries.content[0]
    assert (first.token, first.logprob, first.bytes) == ("G", -0.5, [71])
    assert [each.logprob for each in first.top_logprobs] == [-0.5, -1.5]
    for stream in (False, True):
        made: Any = client.completions.create(
            model="fake", prompt="x", logprobs=2, max_tokens=2, stream=stream
        )
        choices = [each.choices[0] for each in made] if stream else made.choices
        logprobs = [each.logprobs for each in choices]
        assert [token for each in logprobs for token in each.tokens] == ["G", "r"]
        assert [offset for each in logprobs for offset in each.text_offset] == [0, 1]
        assert logprobs[0].token_logprobs[0] == -0.5
        assert len(logprobs[0].top_logprobs[0]) == 2


def test_token_ids_come_where_they_are_asked_for(client: OpenAI, backend: FakeBackend):
    body = {"return_token_ids": True}
    ids = backend.bytes.encode("hi")
    for stream in (False, True):
        made: Any = client.completions.create(
            model="fake", prompt=ids, max_tokens=4, stream=stream, extra_body=body
        )
        choices = [each.choices[0] for each in made] if stream else made.choices
        assert choices[0].prompt_token_ids == ids
        found = [token for each in choices for token in each.token_ids]
        assert found == backend.reply(0)[:4]


def test_tools_reach_the_template(client: OpenAI, backend: FakeBackend):
    tools: Any = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    client.chat.completions.create(model="fake", messages=HELLO, tools=tools)
    assert backend.prompt == "[look ]<user>hello<assistant>"
    client.chat.completions.create(model="fake", messages=HELLO, tools=tools, tool_choice="none")
    assert backend.prompt == "<user>hello<assistant>"


def test_errors_have_the_clients_classes(client: OpenAI, backend: FakeBackend):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="fake", messages=HELLO, temperature=-1)
    assert (wrong.value.param, wrong.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="fake", messages=HELLO, reasoning_effort="low")
    assert refused.value.code == "unsupported_parameter"
    backend.full = True
    with pytest.raises(openai.RateLimitError) as full:
        client.completions.create(model="fake", prompt="x")
    assert full.value.response.headers["retry-after"] == "1"
    backend.full, backend.fails_after = False, 1
    with pytest.raises(openai.InternalServerError) as broken:
        client.completions.create(model="fake", prompt="x", extra_headers={"x-request-id": "mine"})
    assert "secret" not in broken.value.message and "mine" in broken.value.message
    assert broken.value.response.headers["x-should-retry"] == "false"
    assert broken.value.request_id == "mine"


def test_a_failure_in_a_stream_is_no_proper_end(client: OpenAI, backend: FakeBackend):
    backend.fails_after = 3
    stream = client.completions.create(model="fake", prompt="x", stream=True)
    with pytest.raises(openai.APIError, match="the request failed"):
        list(stream)
    backend.fails_after = 1
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="fake", prompt="x", stream=True)


def test_a_reader_that_leaves_aborts_its_request(
    client: OpenAI, backend: FakeBackend, server: Served
):
    backend.token_s = 0.02
    with client.completions.create(model="fake", prompt="x", stream=True) as stream:
        next(iter(stream))
    server.until(lambda: backend.answers[-1].closed and not server.front.requests)
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(model="fake", prompt="x", timeout=0.1)
    server.until(lambda: backend.answers[-1].closed and not server.front.requests)


def test_sixty_four_at_once(backend: FakeBackend, server: Served):
    backend.reset()

    async def ask(client: AsyncOpenAI, number: int) -> str:
        text = ""
        async for chunk in await client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": str(number)}], stream=True
        ):
            text += chunk.choices[0].delta.content or ""
        return text

    async def all_of_them() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, number) for number in range(64)))

    assert asyncio.run(all_of_them()) == [TEXT] * 64
    server.until(lambda: not server.front.requests)
    assert not server.front.answers


def test_models_are_listed(client: OpenAI):
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "pdjax"
