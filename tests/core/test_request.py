import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from pdjax.core.request import Request, SamplingParams
from pdjax.host.sequences.sequence import LEGAL_MOVES, Sequence, State
from tests.helpers.mutate import BadRepr, check_message

pytestmark = pytest.mark.smoke


@pytest.fixture
def sequence() -> Sequence:
    request = Request("r", (1, 2, 3), SamplingParams(), 0.0)
    return Sequence(request, choice=1, seed=0, output=[4], max_new_tokens=6)


@pytest.mark.parametrize("start", State)
@pytest.mark.parametrize("end", State)
def test_only_the_moves_of_the_table(sequence, start, end):
    sequence.state = start
    if end in LEGAL_MOVES[start]:
        sequence.move(end)
        assert sequence.state is end
    else:
        with pytest.raises(RuntimeError, match=rf"r#1: no move from {start.name} to {end.name}"):
            sequence.move(end)
        assert sequence.state is start


def test_every_state_is_reached_and_only_ends_are_final():
    reached = {State.WAITING}.union(*LEGAL_MOVES.values())
    assert reached == set(State)
    ends = {State.FINISHED, State.ABORTED, State.FAILED, State.SHED}
    assert {state for state, moves in LEGAL_MOVES.items() if not moves} == ends
    assert all({State.ABORTED, State.FAILED} <= moves for moves in LEGAL_MOVES.values() if moves)


def test_lengths(sequence):
    assert sequence.prompt_len == 3
    assert sequence.length == 4
    assert sequence.token_ids == [1, 2, 3, 4]
    assert sequence.lifetime_tokens == 8  # the KV of the ninth token is never read


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.0),
        ("guide", "a+"),
        ("logit_bias", [3]),
        ("logit_bias", {-1: 0}),
        ("logit_bias", {"3": 0}),
        ("allowed_token_ids", ()),
        ("allowed_token_ids", (-1,)),
        ("min_tokens", -1),
        ("min_tokens", 17),  # more than max_tokens
        ("seed", -1),
        ("seed", 2**64),
        ("max_tokens", 0),
        ("stop", ("",)),
        ("stop", 5),
        ("stop_token_ids", 5),
        ("stop_token_ids", "5"),
        ("ignore_eos", "no"),
        ("stop_token_ids", (-1,)),
        ("shown_tokens", (-1,)),
        ("logprobs", -1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("n", 0),
        ("n", True),
        ("n", np.array([2])),
        pytest.param("n", -(10**5000), id="n-huge"),
        ("temperature", 10**400),
        pytest.param("temperature", -(10**5000), id="temperature-huge"),
        pytest.param("temperature", Fraction(10**400), id="fraction"),
        pytest.param("presence_penalty", 10**5000, id="penalty-huge"),
        pytest.param("seed", 10**5000, id="seed-huge"),
        ("seed", "7"),
        ("seed", 7.0),
        ("seed", np.float64(7.0)),
        pytest.param("top_p", "x\n" * 10**6, id="top_p-long"),
        ("ignore_eos", BadRepr()),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field}=") as raised:
        SamplingParams(**{field: value})
    check_message(str(raised.value))


@pytest.mark.parametrize(
    ("biases", "message"),
    [
        ({3: 101}, r"logit_bias\[3\]=101: must be a number in \[-100, 100\]"),
        ({3: float("nan")}, r"logit_bias\[3\]=nan: must be a number"),
        (dict.fromkeys(range(1025), 0), "logit_bias: 1025 tokens; must be at most 1024"),
    ],
)
def test_biases_have_bounds(biases, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        SamplingParams(logit_bias=biases)


def test_scalars_of_numpy_are_the_numbers_that_they_are():
    asked: dict[str, Any] = {
        "temperature": np.float32(0.5),
        "top_k": np.int64(3),
        "top_p": np.float64(0.9),
        "seed": np.uint64(2**63),
        "max_tokens": np.int32(5),
        "stop_token_ids": np.array([1, 2], np.int32),
        "logprobs": np.int8(2),
        "prompt_logprobs": np.int64(1),
        "n": np.int16(2),
        "min_tokens": np.int8(1),
        "allowed_token_ids": np.array([3, 4], np.int32),
        "logit_bias": {np.int32(3): np.float32(0.5)},
    }
    params = SamplingParams(**asked)
    plain = SamplingParams(
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        seed=2**63,
        max_tokens=5,
        stop_token_ids=(1, 2),
        logprobs=2,
        prompt_logprobs=1,
        n=2,
        min_tokens=1,
        allowed_token_ids=(3, 4),
        logit_bias={3: 0.5},
    )
    assert params == plain
    assert [type(each) for pair in params.logit_bias.items() for each in pair] == [int, float]
    kinds = {type(value) for name, value in vars(params).items() if name != "guide"}
    assert kinds <= {int, float, bool, tuple, dict}


def test_greedy_choices_would_all_be_the_same():
    with pytest.raises(ValueError, match="n=2 with temperature=0"):
        SamplingParams(n=2, temperature=0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("stop", ["x"] * 1025, "more than 1024 strings; must be at most 1024"),
        ("stop", itertools.repeat("x"), "more than 1024 strings"),
        ("stop", "x" * 16385, "16385 characters in 1 strings; must be at most 16384 together"),
        ("stop", ["x" * 100] * 200, "20000 characters in 200 strings"),
        ("stop_token_ids", range(4097), "more than 4096 token ids; must be at most 4096"),
        ("stop_token_ids", itertools.count(), "more than 4096 token ids"),
    ],
)
def test_what_stops_a_text_has_a_bound(field, value, message):
    with pytest.raises(ValueError, match=f"^{field}: {message}"):
        SamplingParams(**{field: value})


def test_as_much_as_is_allowed_stops_a_text():
    params = SamplingParams(stop=["x" * 16] * 1024, stop_token_ids=range(4096))
    assert params.stop_strings.search(0, "x" * 16)[1] is not None
    assert params.stop_tokens == set(range(4096))


def test_one_stop_string_is_a_tuple_of_one():
    assert SamplingParams(stop="END").stop == ("END",)


def test_none_stops_nothing():
    nothing: Any = None
    params = SamplingParams(stop=nothing, stop_token_ids=nothing)
    assert (params.stop, params.stop_token_ids) == ((), ())


@pytest.mark.parametrize(
    ("params", "penalized"),
    [
        ({}, False),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": -0.1}, True),
        ({"repetition_penalty": 1.1}, True),
    ],
)
def test_penalized(params, penalized):
    assert SamplingParams(**params).penalized == penalized


def a_request(**fields: Any) -> Request:
    return Request("r", (1, 2), SamplingParams(), 0.0, **fields)


def test_a_request_carries_what_policies_go_by():
    labels = {"tenant": "a"}
    request = a_request(priority=np.int64(-3), deadline=np.float32(0.5), labels=labels)
    labels["tenant"] = "b"
    assert (request.priority, request.deadline, request.labels) == (-3, 0.5, {"tenant": "a"})
    assert hash(request) == hash(a_request(priority=-3, deadline=0.5))
    nothing: Any = None
    assert a_request(labels=nothing).labels == a_request().labels == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"priority": 1.5}, "priority=1.5: must be an integer"),
        ({"priority": True}, "priority=True: must be an integer"),
        ({"priority": 2**70}, "priority=1180591620717411303424: must be an integer in"),
        ({"cache_salt": ""}, "cache_salt='': must be None or a string of 1 to 512 characters"),
        ({"cache_salt": b"x"}, "cache_salt=b'x': must be None or a string of 1 to 512"),
        (
            {"cache_pin": -1.0},
            "cache_pin=-1.0: must be None or a number of seconds from 0 to 604800",
        ),
        ({"cache_pin": "1"}, "cache_pin='1': must be None or a number of seconds"),
        ({"deadline": 0}, "deadline=0: must be None or a positive number of seconds after"),
        ({"deadline": float("nan")}, "deadline=nan: must be None or a positive number"),
        ({"deadline": float("inf")}, "deadline=inf: must be None or a positive number"),
        ({"deadline": "soon"}, "deadline='soon': must be None or a positive number"),
        ({"labels": ["a"]}, r"labels=\['a'\]: must be a dict of strings"),
        ({"labels": {str(i): "" for i in range(17)}}, "labels: 17 labels; must be at most 16"),
        ({"labels": {1: "a"}}, "labels=1: names must be strings of 1 to 64 characters"),
        ({"labels": {"a" * 65: "a"}}, "labels='aaa.*: names must be strings of 1 to 64"),
        ({"labels": {"a": 1}}, r"labels\['a'\]=1: must be a string of at most 512 characters"),
        ({"labels": {"a": "b" * 513}}, r"labels\['a'\]='bbb.*: must be a string of at most 512"),
    ],
)
def test_what_policies_could_not_go_by_is_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{message}") as refusal:
        a_request(**fields)
    check_message(str(refusal.value))
