"""What a request of a random deployment asks for."""

import random
from dataclasses import replace

from pdjax.core.request import SamplingParams
from tests.helpers.fake_guides import VOCAB, constrained
from tests.helpers.fakes import POISON, TOP_LOGPROBS


def drawn_prompt(name: str, seed: int, draw: random.Random, max_model_len: int) -> tuple[int, ...]:
    """The prompt of the request `name` of a workload. Many begin alike; some have a poisoned
    token."""
    most = draw.choice((2, max_model_len - 1))
    length = draw.randint(1, most)
    shared = draw.choice((0, length // 2, length - 1))
    prompt = [1 + i % 7 for i in range(shared)]
    prompt += [draw.randrange(VOCAB) for _ in range(length - shared)]
    poison = random.Random(f"poison of {name} in {seed}")
    if poison.random() < 0.05:
        prompt[poison.randrange(length)] = POISON
    return tuple(prompt)


def drawn_params(name: str, seed: int, draw: random.Random, max_model_len: int) -> SamplingParams:
    """Those of the request `name` of a workload; what is younger than the others is drawn by a
    chance of its own."""
    n = draw.choice((1, 1, 1, 2, 3))
    params = SamplingParams(
        temperature=draw.choice((0.0, 1.0)) if n == 1 else 1.0,
        seed=draw.choice((None, draw.randrange(2**40))),
        max_tokens=draw.choice((None, None, 1, draw.randint(1, max_model_len))),
        stop_token_ids=draw.choice(((), (1, 2, 3, 4))),
        ignore_eos=draw.random() < 0.5,
        logprobs=draw.choice((None, 0, TOP_LOGPROBS)),
        presence_penalty=draw.choice((0.0, 0.0, 0.5)),
        repetition_penalty=draw.choice((1.0, 1.0, 1.5)),
        n=n,
    )
    scored = random.Random(f"log-probabilities of the prompt of {name} in {seed}")
    most = scored.choice((None, None, None, 0, TOP_LOGPROBS))
    params = replace(params, prompt_logprobs=most)
    return constrained(params, random.Random(f"form of {name} in {seed}"))
