import pickle

import pytest

from pdjax.core.guide import MAX_GUIDE_BYTES, Guide, GuideKind
from pdjax.core.request import SamplingParams


def test_a_guide_is_plain_data():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    guides = [
        Guide.json_schema(schema),
        Guide.json_schema(True),
        Guide.json_object(),
        Guide.regex("a+"),
        Guide.choices(iter(["yes", "no"])),
        Guide.grammar('start: "a"'),
    ]
    assert len(set(guides)) == 6
    for guide in guides:
        assert pickle.loads(pickle.dumps(guide)) == guide
        assert SamplingParams(guide=guide).constrained
    assert guides[0] == Guide.json_schema(str(guides[0].value), "response_format")
    assert guides[4] == Guide(GuideKind.CHOICES, ("yes", "no"))


@pytest.mark.parametrize(
    ("make", "value", "message"),
    [
        (Guide.regex, "", "guide='': a regular expression must be text that is not empty"),
        (Guide.grammar, 3, "guide=3: a grammar must be text"),
        (Guide.choices, [], r"guide=\(\): a list of choices must be at least one text"),
        (Guide.choices, ["a", ""], "must be at least one text, none empty"),
        (Guide.choices, "yes", "guide='yes': choices must be a list of texts"),
        (Guide.json_schema, {"a": object()}, "guide: the schema is no JSON"),
        (Guide.regex, "\ud800", "guide: must be text that UTF-8 can hold"),
        (Guide.regex, "a" * (MAX_GUIDE_BYTES + 1), "262145 bytes; must be at most 262144"),
        (Guide.grammar, "a" * 65537, "guide: a grammar of 65537 bytes; must be at most 65536"),
        (Guide.choices, "ab" * 2049, "must be a list"),
        (Guide.choices, ["a"] * 4097, "guide: 4097 choices; must be at most 4096"),
    ],
)
def test_what_is_no_guide_is_refused(make, value, message):
    with pytest.raises(ValueError, match=message):
        make(value)
