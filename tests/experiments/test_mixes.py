"""A small run of `mixes` on the CPU, and what it makes of wrong tokens."""

from dataclasses import replace

import pytest

from experiments.mixes import __main__ as mixes
from experiments.mixes import ways
from pdjax.config.load import load_config
from pdjax.host.metrics.work import Span

TINY = ways.SCALES["tiny"]


@pytest.mark.parametrize("scale", ways.SCALES.values(), ids=ways.SCALES)
@pytest.mark.parametrize("devices", [1, 2, 3, 4, 16])
def test_mixes_are_what_the_devices_allow(devices: int, scale: ways.Scale):
    config = ways.truth(scale, devices, None)
    found = ways.mixes(devices, scale)
    names = [mix.name for mix in found]
    assert len(set(names)) == len(names)
    for mix in found:
        assert load_config(config, {"colocated": False, **mix.changes}).devices <= devices
    assert len(found) == {1: 5, 2: 10, 3: 10}.get(devices, 14)
    assert ways.chosen(found, ["bulk", "twice"]) == [
        found[-5 + (devices == 1)],
        found[-2 + (devices == 1)],
    ]
    with pytest.raises(ValueError, match="mixes=\\['fog'\\]: none of tp1"):
        ways.chosen(found, ["fog"])


def test_mixes_are_exact():
    config = ways.truth(TINY, 2, None)
    right = mixes.serve(config, TINY, logprobs=2)
    [mix] = ways.chosen(ways.mixes(2, TINY), ["asked twice"])
    row = mixes.try_mix(config, mix, TINY, right.answers)
    assert row["exact"] == row["answers"] == 2 * len(TINY.lengths), row
    assert row["transfers"]["layout_changing_puts"] == 0
    assert row["transfers"]["pages_skipped"] > 0
    assert row["prefill_ms"] > 0 and row["tick_ms"] > 0 and row["of_peak"] > 0
    assert not mixes.wrong(row)

    # A different token is found and reported with the truth's preference.
    answers = [replace(answer, choices=list(answer.choices)) for answer in right.answers]
    tokens = list(answers[3].token_ids)
    tokens[2] += 1
    answers[3].choices[0] = replace(answers[3].choices[0], token_ids=tokens)
    found = mixes.compare(answers, right.answers)
    total = sum(len(answer.token_ids) for answer in answers)
    assert (found["exact"], found["answers"]) == (len(answers) - 1, len(answers))
    assert found["tokens_right"] == total - len(tokens) + 2
    assert found["margin"] > 0
    row = {"mix": "bent"} | found | right.to_json()
    assert mixes.wrong(row)
    assert "bent: the truth preferred its own token by up to" in mixes.show([row])


def test_a_mix_that_cannot_run_says_why():
    row = mixes.try_mix(ways.truth(TINY, 2, None), ways.Mix("x", {"prefill.tp": 3}), TINY, [])
    assert mixes.wrong(row)
    lines = mixes.show([row]).splitlines()
    assert lines[2].split()[:2] == ["x", "failed"]
    assert lines[3].startswith("x: ValueError: ")


def test_a_step_begins_when_its_predecessor_ends():
    spans = [
        Span("decode/0", "tick", 0.0, 2.0, {}),
        Span("prefill/0", "step", 0.0, 9.0, {}),
        Span("decode/0", "tick", 1.0, 3.0, {}),
        Span("decode/1", "tick", 1.0, 2.0, {}),
    ]
    assert mixes.step_ms(spans, "decode/") == pytest.approx(1000.0)
    assert mixes.step_ms(spans, "transfer/") is None
