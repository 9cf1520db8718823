"""Which tokens may come next, with a guide whose states are known."""

import numpy as np
import pytest

from pdjax.core.request import SamplingParams
from pdjax.host.sequences.constraint import Constraint

V, END = 40, 35


class Letters:
    """A form of the tokens 1, 2, 3 in turn, which may end after 2 and must after 3."""

    def __init__(self) -> None:
        self.last = 0

    @property
    def accepts(self) -> bool:
        return self.last >= 2

    @property
    def complete(self) -> bool:
        return self.last == 3

    def mask(self) -> np.ndarray:
        return np.array([1 << self.last + 1, 1 << END - 32], np.uint32)  # END is text here

    def push(self, token_id: int) -> None:
        self.last = token_id


def constraint(guide: Letters | None = None, **params) -> Constraint:
    return Constraint(SamplingParams(**params), guide, V, [END])


def allowed(made: Constraint) -> list[int] | None:
    if made.mask is None:
        return None
    assert made.mask.dtype == np.uint32
    return np.flatnonzero(np.unpackbits(made.mask.view(np.uint8), bitorder="little")[:V]).tolist()


def walk(made: Constraint, tokens: list[int]) -> list[list[int] | None]:
    """What is allowed at first, and after each token."""
    found = [allowed(made)]
    for token in tokens:
        made.advance(token)
        found.append(allowed(made))
    return found


def test_an_end_token_may_come_where_the_form_accepts():
    assert walk(constraint(Letters()), [1, 2]) == [[1], [2], [3, END]]
    assert walk(constraint(Letters(), ignore_eos=True), [1, 2]) == [[1], [2], [3]]
    assert walk(constraint(Letters(), min_tokens=3), [1, 2]) == [[1], [2], [3]]
    made = constraint(Letters())
    walk(made, [1, 2])
    assert not made.complete
    made.advance(3)
    assert made.complete
    assert not constraint(Letters()).again(Letters()).complete


def test_choices_begin_alike_and_go_on_by_themselves():
    first = constraint(Letters(), min_tokens=3)
    second = first.again(Letters())
    assert walk(first, [1, 2]) == [[1], [2], [3]]
    assert walk(second, [1]) == [[1], [2]]


def test_after_the_last_token_nothing_is_worked_out():
    made = constraint(Letters(), allowed_token_ids=[1, 2, 3])
    made.advance(2, last=True)
    assert (allowed(made), made.complete) == ([1], False)


def test_end_tokens_that_the_model_does_not_have_change_nothing():
    made = Constraint(SamplingParams(min_tokens=1), Letters(), V, [END, V, 2 * V])
    assert walk(made, [1, 2]) == [[1], [2], [3, END]]


def test_tokens_that_are_allowed_stay_the_same():
    assert walk(constraint(allowed_token_ids=[0, 32, 39]), [0]) == [[0, 32, 39]] * 2
    assert walk(constraint(Letters(), allowed_token_ids=[1, 2, END]), [1, 2])[-1] == [END]


def test_before_the_least_number_of_tokens_nothing_ends():
    most = [token for token in range(V) if token not in (END, 4)]
    assert walk(constraint(min_tokens=2, stop_token_ids=[4]), [1, 1]) == [most, most, None]
    both = constraint(min_tokens=1, allowed_token_ids=[5, END])
    assert walk(both, [5]) == [[5], [5, END]]


@pytest.mark.parametrize(
    "params", [{"allowed_token_ids": [7]}, {"min_tokens": 1, "stop_token_ids": [1]}]
)
def test_no_token_at_all_is_an_error(params):
    with pytest.raises(ValueError, match="guide, allowed_token_ids, min_tokens: together"):
        constraint(Letters(), **params)
