"""Saved workloads, traces, and what makes another workload of one."""

import json
from pathlib import Path
from typing import Any

import pytest

from pdjax.core.slo import SLO
from pdjax.workloads.arrival import Arrival, Piece
from pdjax.workloads.chances import Arrivals, Gaps, fixed
from pdjax.workloads.files import read_azure, read_mooncake, read_workload, write_workload
from pdjax.workloads.schedule import Schedule
from pdjax.workloads.synthetic import Shape, conversations, regular
from pdjax.workloads.transforms import at_rate, mean_rate, scaled, within

SHAPE = Shape(fixed(10), fixed(4))
MOONCAKE = [
    {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 3000, "input_length": 1024, "output_length": 7, "hash_ids": [0, 1]},
    {"timestamp": 3000, "input_length": 600, "output_length": 1, "hash_ids": [0, 9]},
]
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:17:03.9799600,4808,10\r\n"
    "2023-11-16 18:17:04.0319600,3180,8\r\n"
    "2023-11-17 00:00:00,110,27"
)


def mooncake(folder: Path, lines: list = MOONCAKE) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_saved_workload_is_read_as_it_was(tmp_path: Path):
    made = conversations(Arrivals(1.0), SHAPE, SHAPE, fixed(3), 4, Gaps(1.0, 1.0))
    made += regular(0.1, [(3, 1)] * 3)
    path = tmp_path / "deep" / "saved.jsonl"
    write_workload(path, made)
    assert read_workload(path) == made
    first = json.loads(path.read_text().split("\n")[0])
    assert "after" not in first and first["pieces"] == [["seed 0 of 0", 10]]


def test_what_policies_go_by_is_saved_and_asked(tmp_path: Path):
    wishes: dict[str, Any] = {
        "priority": -2,
        "deadline": 1.5,
        "slo": SLO(ttft=0.3),
        "labels": {"tenant": "a"},
    }
    made = [Arrival(0.0, 3, 1, session="s", **wishes), Arrival(0.0, 3, 1)]
    path = tmp_path / "saved.jsonl"
    write_workload(path, made)
    assert read_workload(path) == made
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first["slo"] == {"ttft": 0.3} and not second.keys() & wishes.keys()
    asked = made[0].request(0, 100)
    assert (asked.priority, asked.deadline, asked.slo) == (-2, 1.5, SLO(ttft=0.3))
    assert asked.labels == {"session": "s", "tenant": "a"}


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("nonsense", "saved.jsonl:2: no JSON"),
        ("[1]", "saved.jsonl:2: must be an object"),
        (
            '{"moment": 0, "prompt": 1, "output": 1, "colour": 2}',
            "saved.jsonl:2: colour: no such key",
        ),
        ('{"moment": 0, "prompt": 1}', "saved.jsonl:2: .*'output'"),
        ('{"moment": 0, "prompt": 1, "output": 1, "slo": {"x": 1}}', "saved.jsonl:2: .*'x'"),
        ('{"moment": 0, "prompt": 1, "output": 1, "slo": {"ttft": 0}}', "2: slo.ttft=0: must be"),
        (
            '{"moment": 0, "prompt": 1, "output": 1, "slo": {"itl": 1}}',
            "2: slo: must have no bound",
        ),
        ('{"moment": 0, "prompt": 1, "output": 1, "deadline": -1}', "2: deadline=-1: must be"),
        ('{"moment": 0, "prompt": 1, "output": 1, "priority": "x"}', "2: priority='x': must be"),
        ('{"moment": 0, "prompt": 1, "output": 1, "labels": {"a": 1}}', "2: labels.*must be a str"),
        ('{"moment": 0, "prompt": 0, "output": 1}', "saved.jsonl:2: prompt=0"),
    ],
)
def test_a_line_that_is_no_request_is_named(line: str, match: str, tmp_path: Path):
    path = tmp_path / "saved.jsonl"
    path.write_text(f'{{"moment": 0, "prompt": 1, "output": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=match):
        read_workload(path)


def test_equal_hash_ids_of_mooncake_are_equal_tokens(tmp_path: Path):
    made = read_mooncake(mooncake(tmp_path))
    assert [(each.moment, each.prompt, each.output) for each in made] == [
        (0.0, 1100, 5),
        (3.0, 1024, 7),
        (3.0, 600, 1),
    ]
    first, second, third = (call.prompt for call in Schedule(made, 32_000).take())
    assert first[:1024] == second and len(first) == 1100
    assert third[:512] == first[:512] and third[512:] != first[512:600]
    assert len(read_mooncake(mooncake(tmp_path), limit=2)) == 2


def test_moments_of_mooncake_may_be_spread(tmp_path: Path):
    lines = [{**MOONCAKE[2], "timestamp": 3000 * (i // 50)} for i in range(200)]
    made = read_mooncake(mooncake(tmp_path, lines), spread=3.0, seed=1)
    moments = [each.moment for each in made]
    assert moments == sorted(moments) and len(set(moments)) == 200
    assert all(3 * (i // 50) <= moment < 3 * (i // 50) + 3 for i, moment in enumerate(moments))


def test_azure_is_read_from_its_first_moment_on(tmp_path: Path):
    path = tmp_path / "azure.csv"
    path.write_bytes(AZURE.encode())
    made = read_azure(path)
    assert [each.moment for each in made] == pytest.approx([0.0, 0.052, 20_576.02004], abs=1e-7)
    assert [(each.prompt, each.output) for each in made] == [(4808, 10), (3180, 8), (110, 27)]
    prompts = [call.prompt[:32] for call in Schedule(made, 32_000).take()]
    assert len(set(prompts)) == 3 and len(read_azure(path, limit=1)) == 1


@pytest.mark.parametrize(
    ("read", "text", "match"),
    [
        (read_mooncake, '{"timestamp": 0}', "trace:1: 'input_length'"),
        (
            read_mooncake,
            '{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1]}',
            "trace:1: hash_ids: 1; must be 2",
        ),
        (read_azure, "a,b\n1,2", "trace:2: 'TIMESTAMP'"),
        (read_azure, "TIMESTAMP,ContextTokens,GeneratedTokens\nnow,1,1", "trace:2: .*'now'"),
    ],
)
def test_a_trace_of_another_form_is_refused(read, text: str, match: str, tmp_path: Path):
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(ValueError, match=match):
        read(path)


def test_scaled_prompts_share_as_large_a_part(tmp_path: Path):
    made = scaled(read_mooncake(mooncake(tmp_path)), time=0.5, prompt=1 / 8, output=3.0)
    assert [(each.moment, each.prompt, each.output) for each in made] == [
        (0.0, 138, 15),  # 76 tokens of the last block are 9.5, and 10 when they are rounded
        (1.5, 128, 21),
        (1.5, 75, 3),
    ]
    first, second, third = (call.prompt for call in Schedule(made, 32_000).take())
    assert first[:128] == second and third[:64] == first[:64]
    assert [each.prompt for each in scaled(regular(1.0, [(5, 1)]), prompt=0.01)] == [1]


def test_a_workload_comes_at_another_rate_and_thinks_as_long():
    made = conversations(Arrivals(1.0), SHAPE, SHAPE, fixed(2), 200, Gaps(3.0), seed=1)
    faster = at_rate(made, 10.0)
    assert mean_rate(faster) == pytest.approx(10.0)
    assert {each.moment for each in faster if each.after} == {3.0}
    assert mean_rate(regular(0.0, [(1, 1)] * 3)) is None
    assert mean_rate(regular(0.25, [(1, 1)] * 5)) == pytest.approx(4.0)


def test_what_is_too_long_keeps_its_beginning():
    long = Arrival(0.0, 90, 20, pieces=(Piece("a", 50), Piece("b", 40)))
    short, endless = Arrival(1.0, 10, 5), Arrival(2.0, 10, 500)
    kept = within([long, short, endless], 64)
    assert [(each.prompt, each.output) for each in kept] == [(44, 20), (10, 5), (1, 63)]
    assert kept[0].pieces == (Piece("a", 44),) and [each.id for each in kept] == ["r0", "r1", "r2"]
    assert [each.id for each in within([long, short, endless], 64, cut=False)] == ["r1"]


def test_turns_for_which_there_is_no_room_are_left_out():
    made = conversations(Arrivals(1.0), SHAPE, SHAPE, fixed(5), 2, Gaps(1.0))
    kept = within(made, 3 * 14 + 4)  # a fourth turn would have no room for its prompt
    assert [each.id for each in kept] == [f"s{s}t{t}" for s in (0, 1) for t in range(3)]
    cut = within(made, 3 * 14 + 7)
    assert [each.prompt for each in cut] == [10, 10, 10, 3] * 2
    assert len(within(made, 3 * 14 + 7, cut=False)) == 6


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: scaled([], prompt=0.0), "prompt=0.0: must be more than 0"),
        (lambda: scaled([], time=-1.0), "time=-1.0: must be 0 or more"),
        (lambda: at_rate(regular(1.0, [(1, 1)]), 1.0), "arrivals: have no rate"),
        (lambda: at_rate([], 0.0), "rate=0.0: must be more than 0"),
        (lambda: within([], 1), "context=1: must be at least 2"),
    ],
)
def test_what_cannot_be_made_of_a_workload_is_refused(make, match: str):
    with pytest.raises(ValueError, match=match):
        make()
