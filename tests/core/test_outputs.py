"""What answers look like at a prompt."""

from pdjax.core.outputs import Completion, RequestOutput

WHOLE = Completion(list(range(500)), "word " * 100, "length", None, None, None, None)
FAILED = Completion([], "", "error", None, None, "no pages", None)


def test_the_repr_of_an_answer_is_short():
    output = RequestOutput("request-3", "The capital", list(range(900)), [WHOLE, FAILED])
    assert repr(output) == (
        "RequestOutput('request-3', prompt='The capital' (900 tokens), "
        f"Completion({'word ' * 12!r}... (500 tokens), finish_reason='length'), "
        "Completion(0 tokens, finish_reason='error', error='no pages'))"
    ).replace("'...", "...'")
    assert "prompt=1 token," in repr(RequestOutput("r", None, [7], []))
