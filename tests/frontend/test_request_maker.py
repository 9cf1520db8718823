"""What a caller asks, as requests: options are checked by name; and the text of an answer."""

from typing import Any

import pytest

from pdjax.core.clock import VirtualClock
from pdjax.core.request import Request, SamplingParams
from pdjax.request_maker import RequestMaker, text_maker
from pdjax.text.byte_tokenizer import END, END_TEXT, byte_tokenizer

ALLOWED = "priority, deadline, labels, slo, cache_salt, cache_pin"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 2}, r"^max_tokens: is given as SamplingParams\(max_tokens=...\)$"),
        (
            {"urgent": True},
            f"^urgent: no such option; allowed are {ALLOWED}$",
        ),
        (
            {"tools": []},
            f"^tools: no such option; allowed are {ALLOWED}$",
        ),
    ],
)
def test_an_argument_that_is_no_option_is_refused(options: Any, message: str):
    maker = RequestMaker("tiny", None, VirtualClock())
    with pytest.raises(TypeError, match=message):
        maker.of_prompts([1, 2], None, options)


def test_a_conversation_has_further_options():
    maker = RequestMaker("tiny", None, VirtualClock())
    options: Any = {"tool": []}
    with pytest.raises(TypeError, match=r"tool: no such option; allowed are .*, tools, documents"):
        maker.of_conversation([{"role": "user", "content": "a"}], None, options)


def test_the_text_keeps_the_control_tokens_that_are_shown():
    make = text_maker(byte_tokenizer())
    assert make is not None
    for shown, expected in (((), "a"), ((END,), f"a{END_TEXT}")):
        text = make(Request("r", (1,), SamplingParams(shown_tokens=shown), 0.0))
        for token in (ord("a"), END):
            text.push(token)
        text.finish()
        assert text.text == expected
