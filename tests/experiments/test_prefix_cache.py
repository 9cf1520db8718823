"""The golden table of Mooncake's traces, found again by the production prefix index."""

import json
from pathlib import Path

import pytest

from experiments.prefix_cache import __main__ as prefix_cache
from experiments.prefix_cache.replay import Lookup, lookups
from experiments.prefix_cache.traces import NAMES, read_trace, write_trace
from pdjax.flags import status

GOLDEN = {
    "conversation": {"3M": 0.138, "10M": 0.291, "30M": 0.366, "unlimited": 0.374},
    "synthetic": {"3M": 0.315, "10M": 0.577, "30M": 0.651, "unlimited": 0.651},
}
"""Token hit rates of one LRU over blocks of 512 tokens, counted without any of this code."""

REQUESTS = {"conversation": 12_031, "synthetic": 3_993}

TRACE = [
    {"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [0, 1]},
    {"timestamp": 3, "input_length": 1400, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 9, "input_length": 600, "output_length": 5, "hash_ids": [3, 4]},
    {"timestamp": 9, "input_length": 1400, "output_length": 5, "hash_ids": [0, 1, 2]},
]


def of_mooncake(folder: Path) -> Path:
    path = folder / "some_trace.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in TRACE))
    return path


@pytest.fixture(scope="module", params=NAMES)
def trace(request) -> tuple[str, list[Lookup]]:
    return request.param, list(lookups(read_trace(request.param)))


def test_the_golden_table(trace):
    name, asked = trace
    assert len(asked) == REQUESTS[name]
    for capacity, rate in GOLDEN[name].items():
        point = prefix_cache.measure(name, asked, "lru", capacity)
        assert f"{point}" == f"{name} lru {capacity} {rate:.3f}"


def test_a_trace_of_mooncakes_is_read_and_written(tmp_path: Path):
    prompts = read_trace(str(of_mooncake(tmp_path)))
    assert [(each.length, list(each.blocks)) for each in prompts] == [
        (line["input_length"], line["hash_ids"]) for line in TRACE
    ]
    written = tmp_path / "written.txt.gz"
    write_trace(prompts, written)
    first = written.read_bytes()
    write_trace(read_trace("synthetic"), written)
    assert (
        written.read_bytes()
        == Path("experiments/prefix_cache/traces/synthetic.txt.gz").read_bytes()
    )
    write_trace(prompts, written)
    assert written.read_bytes() == first


def test_it_answers_its_question(tmp_path: Path, capsys):
    out = tmp_path / "prefix_cache.json"
    arguments = [f"--traces={of_mooncake(tmp_path)}", "--capacities=3100,1M,unlimited"]
    arguments += ["--engines=2", "--policies=prefix_lru,lru,lfu", f"--out={out}"]
    assert status(prefix_cache.main, prefix_cache.FLAGS, "", ["prefix_cache", *arguments]) == 0
    printed = capsys.readouterr().out.splitlines()
    # Of 4,400 tokens 1,024 are found at the second prompt, and 1,400 at the last one.
    assert "some_trace lru unlimited 0.551" in printed
    assert "some_trace prefix_lru/2-prefix_aware unlimited 0.551" in printed
    assert "predicted: ends go first: right" in printed
    whole = json.loads(out.read_text())
    assert [point["engines"] for point in whole["points"]] == [1] * 9 + [2] * 6
    assert all(0 < point["saved"] < 1 for point in whole["points"])


@pytest.mark.parametrize("capacity", ["3G", "-1", "0", "M", "1.5M"])
def test_a_capacity_is_tokens(capacity):
    with pytest.raises(ValueError, match=f"capacities={capacity}: must be tokens"):
        prefix_cache.tokens_of(capacity)


def test_the_longest_prompt_must_fit():
    asked = [Lookup(1400, [b"0", b"1", b"2"])]
    with pytest.raises(ValueError, match=r"capacities=1024: 2 pages .* longest prompt needs 3"):
        prefix_cache.measure("some", asked, "lru", "1024")
