import pytest

from pdjax.core.request import Request, SamplingParams
from pdjax.host.sequences.limits import Limits, choices, seed_of

LIMITS = Limits(
    vocab_size=100,
    max_model_len=32,
    max_logprobs=5,
    max_waiting=4,
    prefill_tokens=24,
    decode_tokens=20,
)


def request(prompt=(1, 2), **params) -> Request:
    return Request("r", tuple(prompt), SamplingParams(**params), 0.0)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (request([]), r"prompt_token_ids=\(\): must have at least one"),
        (request([5, 100]), "prompt_token_ids: 100 is not a token id; allowed are 0 to 99"),
        (request([-1]), "prompt_token_ids: -1 is not"),
        (request([True]), "prompt_token_ids: True is not"),
        (request(["a"]), "prompt_token_ids: 'a' is not"),
        (request(stop_token_ids=[100]), "stop_token_ids: 100 is not"),
        (request([1] * 32), "32 tokens.*context is 32.*at most 31"),
        (request(logprobs=6), "logprobs=6: must be at most 5"),
        (request(prompt_logprobs=6), "prompt_logprobs=6: must be at most 5"),
        (request(n=10**9), "n=1000000000: must be at most max_waiting=4"),
        (request(n=10**5000), "n=<integer of 16610 bits>: must be at most max_waiting=4"),
        (request(logprobs=10**5000), "logprobs=<integer of 16610 bits>: must be at most 5"),
        (request([10**5000]), "prompt_token_ids: <integer of 16610 bits> is not a token id"),
        (request(["x" * 10**6]), "prompt_token_ids: 'xxx.*is not a token id"),
        (request([[1]]), r"prompt_token_ids: \[1\] is not a token id"),
        (request([1.0]), "prompt_token_ids: 1.0 is not a token id"),
        (request([1] * 10**6), "1000000 tokens.*context is 32.*at most 31"),
        (request(n=5), "n=5: must be at most max_waiting=4"),
        (
            request([1] * 5, max_tokens=17),
            "max_tokens.*decode pool holds 20.*max_tokens at most 16",
        ),
        (request([1] * 25, max_tokens=1), "prompt_token_ids.*prefill pool holds 24.*at most 24"),
    ],
)
def test_what_can_never_be_served_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        LIMITS.check(asked)


def test_what_just_fits_is_not():
    LIMITS.check(request([1] * 5, max_tokens=16, logprobs=5, n=4))
    LIMITS.check(request([1] * 24, max_tokens=1))  # needs no decode


def test_the_context_cuts_the_output():
    assert LIMITS.max_new_tokens(request([1] * 30, max_tokens=9)) == 2
    assert LIMITS.max_new_tokens(request([1] * 30, max_tokens=None)) == 2
    assert LIMITS.max_new_tokens(request([1] * 30, max_tokens=1)) == 1


def test_seeds_are_stable():
    # Written down: a seed must mean the same in every version.
    assert seed_of("asked", 0, 0) == 1973876789
    assert seed_of("asked", 2**63, 1) == 4167610739


def test_a_choice_has_the_same_seed_however_many_there_are():
    one = choices(request(seed=3), LIMITS, order=0, drawn_from=0)
    many = choices(request(seed=3, n=3), LIMITS, order=9, drawn_from=1)
    assert one[0].seed == many[0].seed
    assert len({sequence.seed for sequence in many}) == 3
    assert [(sequence.choice, sequence.order) for sequence in many] == [(0, 9), (1, 10), (2, 11)]
    assert all(0 <= sequence.seed < 2**32 for sequence in many)


def test_drawn_seeds_differ_from_request_to_request_and_repeat_from_run_to_run():
    def drawn(order: int, drawn_from: int) -> int:
        return choices(request(), LIMITS, order, drawn_from)[0].seed

    assert len({drawn(0, 0), drawn(1, 0), drawn(0, 1)}) == 3
    assert drawn(1, 0) == drawn(1, 0)
