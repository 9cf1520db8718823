"""What a caller asks, as requests: options are checked by name."""

from typing import Any

import pytest

from pdjax.core.clock import VirtualClock
from pdjax.request_maker import RequestMaker


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 2}, r"^max_tokens: is given as SamplingParams\(max_tokens=...\)$"),
        ({"urgent": True}, "^urgent: no such option; allowed are priority, deadline, labels$"),
        ({"tools": []}, "^tools: no such option; allowed are priority, deadline, labels$"),
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
