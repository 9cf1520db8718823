import json
import math

import numpy as np
import pytest

from pdjax.formats.strict_json import dumps

pytestmark = pytest.mark.smoke


def refuse(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_what_is_not_finite_is_null_wherever_it_stands(value):
    text = dumps({"a": value, "b": [1.5, (value, {"c": value})], value: 1})
    read = json.loads(text, parse_constant=refuse)
    assert read["a"] is None and read["b"] == [1.5, [None, {"c": None}]]


def test_any_text_is_ascii():
    text = dumps(["Zürich 🔥 \ud800"])
    assert text.isascii() and json.loads(text) == ["Zürich 🔥 \ud800"]
