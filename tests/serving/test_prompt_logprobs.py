"""Log-probabilities of prompts: `echo` with `logprobs`, and vLLM's `prompt_logprobs`."""

from typing import Any

import openai
import pytest
from openai import OpenAI

from pdjax.serving import front
from pdjax.serving.logprobs import offsets_of
from tests.helpers.fake_backend import FakeBackend, Served
from tests.helpers.http_client import Http, error_of

PROMPT = "héa"
LIKELY = -0.5
"""Of the fake's own tokens, and of the likeliest token in each place of a prompt."""
HELLO: Any = [{"role": "user", "content": "hello"}]


def joined(chunks: list[Any]) -> dict[str, list[Any]]:
    """The `logprobs` of a choice's chunks as one."""
    found: dict[str, list[Any]] = {}
    for chunk in chunks:
        for name, values in chunk.choices[0].logprobs.model_dump().items():
            found.setdefault(name, []).extend(values)
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_echoed_with_its_log_probabilities(
    client: OpenAI, backend: FakeBackend, stream: bool
):
    ids = backend.bytes.encode(PROMPT)
    for prompt in (PROMPT, ids):
        made: Any = client.completions.create(
            model="fake", prompt=prompt, echo=True, logprobs=1, max_tokens=2, stream=stream
        )
        chunks = list(made) if stream else [made]
        assert "".join(chunk.choices[0].text for chunk in chunks) == PROMPT + "Gr"
        logprobs = joined(chunks)
        names = [backend.bytes.decode([token]) for token in ids]
        assert logprobs["tokens"] == [*names, "G", "r"]
        assert logprobs["token_logprobs"] == [None, *(-token for token in ids[1:]), LIKELY, LIKELY]
        assert logprobs["text_offset"] == [0, 1, 1, 2, 3, 4], "the second character is two tokens"
        unknown = "\ufffd"  # a part of a character; of two with this name the likelier one stays
        assert logprobs["top_logprobs"] == [
            None,
            {unknown: LIKELY},
            {unknown: LIKELY},
            {"b": LIKELY, "a": -ids[-1]},
            {"G": LIKELY},
            {"r": LIKELY},
        ]


def test_what_lm_eval_asks_for(client: OpenAI, backend: FakeBackend):
    """Lists of token ids, one token, of which it reads all but the last one."""
    contexts = [backend.bytes.encode(text) for text in ("one", "three")]
    made = client.completions.create(
        model="fake", prompt=contexts, max_tokens=1, temperature=0, logprobs=1, seed=1, echo=True
    )
    for ids, choice in zip(contexts, made.choices, strict=True):
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs == [None, *(-token for token in ids[1:]), LIKELY]
        assert choice.logprobs.tokens is not None
        assert len(choice.logprobs.tokens) == len(ids) + 1
        assert choice.finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_every_choice_has_the_prompt(client: OpenAI, stream: bool):
    made: Any = client.completions.create(
        model="fake", prompt="ab", echo=True, logprobs=0, max_tokens=1, n=2, temperature=1,
        stream=stream,
    )  # fmt: skip
    choices = [each.choices[0] for each in made] if stream else made.choices
    assert [choice.index for choice in choices] == [0, 1]
    assert [choice.logprobs.tokens for choice in choices] == [["a", "b", "G"]] * 2
    assert all(len(choice.logprobs.top_logprobs[1]) == 1 for choice in choices)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_alone(client: OpenAI, stream: bool):
    made: Any = client.completions.create(
        model="fake", prompt="ab", echo=True, logprobs=2, max_tokens=0, stream=stream,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    [choice] = [each.choices[0] for each in made] if stream else made.choices
    assert (choice.text, choice.finish_reason, choice.token_ids) == ("ab", "length", [])
    assert choice.logprobs.tokens == ["a", "b"]
    with pytest.raises(openai.BadRequestError, match="max_tokens=0"):
        client.completions.create(model="fake", prompt="ab", logprobs=2, max_tokens=0)


def test_prompt_logprobs_in_the_form_of_vllm(client: OpenAI, backend: FakeBackend):
    ids = backend.bytes.encode("ab")
    asks: Any = {"model": "fake", "max_tokens": 1, "extra_body": {"prompt_logprobs": 1}}
    made: Any = client.completions.create(prompt=ids, **asks)
    likeliest = ids[1] + 1
    expected = [
        None,
        {
            str(ids[1]): {"logprob": -ids[1], "rank": ids[1], "decoded_token": "b"},
            str(likeliest): {"logprob": LIKELY, "rank": 1, "decoded_token": "c"},
        },
    ]
    assert made.choices[0].prompt_logprobs == expected
    assert made.choices[0].logprobs is None and made.choices[0].text == "G"
    chat: Any = client.chat.completions.create(messages=HELLO, **asks)
    assert len(chat.prompt_logprobs) == len(backend.asked.prompt_token_ids)
    assert chat.prompt_logprobs[0] is None and len(chat.prompt_logprobs[1]) == 2
    body = {"prompt_logprobs": 3}
    both: Any = client.completions.create(
        model="fake", prompt=ids, max_tokens=1, echo=True, logprobs=1, extra_body=body
    )
    assert [len(each) for each in both.choices[0].prompt_logprobs[1:]] == [4]
    assert len(both.choices[0].logprobs.top_logprobs[1]) == 2
    with pytest.raises(openai.BadRequestError, match="not allowed with stream=true"):
        client.completions.create(model="fake", prompt="x", stream=True, extra_body=body)
    plain = client.completions.create(model="fake", prompt="x").choices[0]
    assert not hasattr(plain, "prompt_logprobs")


def test_a_response_has_a_bound(
    server: Served, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(front, "MOST_SCORES", 12)
    http = Http(backend)
    body = {"prompt": ["abc", "def"], "max_tokens": 1, "prompt_logprobs": 1}
    assert http.post("/v1/completions", json=body).status_code == 200
    error = error_of(http.post("/v1/completions", json={**body, "prompt_logprobs": 2}))
    assert error["param"] == "prompt" and "18 log-probabilities" in error["message"]
    assert http.post("/v1/completions", json={"prompt": "x" * 99}).status_code == 200


def test_offsets_are_those_of_the_text_that_is_repeated(tmp_path: Any):
    tokenizer = FakeBackend(tmp_path, special=("<bos>", "<end>")).bytes
    bos = tokenizer.encode("<bos>")
    assert len(bos) == 1
    ids = [*bos, *tokenizer.encode("ab")]
    assert offsets_of(tokenizer, ids, "ab") == [0, 0, 1]
    assert offsets_of(tokenizer, ids, "<bos>ab") == [0, 5, 6]
    assert offsets_of(None, ids, "") == [0, 0, 0]
