"""The accepted forms of prompts and params; other values are refused in one line."""

import itertools
from typing import Any

import numpy as np
import pytest

from pdjax.text.prompts import each_conversation, each_prompt, params_of_each, token_ids_of

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("make", [list, tuple, iter, np.array, lambda ids: (i for i in ids)])
def test_token_ids_of_any_kind_are_one_prompt(make: Any):
    [prompt] = each_prompt(make([5, 6, 7]))
    assert token_ids_of(prompt) == [5, 6, 7]


@pytest.mark.parametrize("make", [list, iter, lambda each: map(iter, each), np.array])
def test_no_prompt_of_several_is_lost(make: Any):
    several = each_prompt(make([[1, 2], [3, 4], [5, 6]]))
    assert [token_ids_of(prompt) for prompt in several] == [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize("values", [itertools.count(), itertools.repeat(3), itertools.cycle("a")])
def test_endless_iterators_are_refused(monkeypatch, values: Any):
    monkeypatch.setattr("pdjax.text.prompts.MOST", 1000)
    for read in (each_prompt, token_ids_of, each_conversation, params_of_each):
        with pytest.raises(ValueError, match=": more than 1000 values; must be at most 1000"):
            read(values)


@pytest.mark.parametrize("values", [5, None, object(), b"ab", {1: 2}, {1, 2}, np.array(3)])
def test_what_has_no_order_is_refused(values: Any):
    for read in (each_prompt, token_ids_of, each_conversation, params_of_each):
        with pytest.raises(ValueError, match="must be"):
            read(values)
