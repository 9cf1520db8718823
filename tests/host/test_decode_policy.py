"""Who gives way, how many rows are taken, and how long a sequence waits for one."""

import random
from math import ceil
from typing import Any

import pytest

from pdjax.config import Config, PoliciesConfig
from pdjax.config.policies import VICTIMS as NAMES
from pdjax.host.policies.api import PolicySetup
from pdjax.host.policies.decode import FcfsDecode
from pdjax.host.policies.registry import POLICIES
from pdjax.host.policies.router import LeastLoaded
from pdjax.host.policies.victims import VICTIMS
from pdjax.host.sequences.sequence import Sequence
from tests.helpers.views import decode_view, sequence, times


def policy(kind: Any = FcfsDecode, **config: Any) -> FcfsDecode:
    return kind(PolicySetup(Config(policies=PoliciesConfig(**config)), LeastLoaded()))


def test_the_config_knows_every_victim():
    assert tuple(VICTIMS) == NAMES
    with pytest.raises(ValueError, match=r"^policies.victim='oldest': allowed are youngest, "):
        PoliciesConfig(victim="oldest")
    with pytest.raises(ValueError, match=r"^policies.tpot_target=0: must be None or above 0"):
        PoliciesConfig(tpot_target=0)


@pytest.mark.parametrize(
    ("victim", "order"),
    [
        ("youngest", [3, 2, 1, 0]),
        ("lowest_priority", [1, 3, 2, 0]),
        ("most_pages", [0, 3, 1, 2]),
        ("latest_deadline", [3, 0, 1, 2]),
    ],
)
def test_who_gives_way(victim: str, order: list[int]):
    holders = [
        sequence(0, 4, pages=3, asked={"priority": -1}),
        sequence(1, 4, pages=1, asked={"priority": 5, "deadline": 9.0}),
        sequence(2, 4, pages=1, asked={"deadline": 4.0}),
        sequence(3, 4, pages=1),
    ]
    if victim == "most_pages":
        holders[3].pages, holders[1].pages, holders[2].pages = [1, 2], [3], []
    gone = []
    while len(holders) > 1:
        [first, *_] = [each for each in holders if each.order == order[-1]]
        plan = policy(victim=victim).grow([first], holders, 0, 0.0)
        assert plan.victims and plan.grown == (first,)
        gone.append(plan.victims[0].order)
        holders.remove(plan.victims[0])
    assert gone == order[: len(gone)]


def test_no_row_more_is_taken_than_keeps_the_pace():
    steady = times(0.01, 0.002)
    held = policy(tpot_target=0.0161)  # three rows
    ready = [sequence(i, 4) for i in range(4)]
    view = decode_view(free_pages=99, total_pages=99, token_times=steady)
    assert len(held.admit(ready, [view], 0.0)) == 3
    assert len(policy().admit(ready, [view], 0.0)) == 4
    assert len(policy(tpot_target=1e-6).admit(ready, [view], 0.0)) == 1  # an empty engine takes one
    unknown = decode_view(free_pages=99, total_pages=99)
    assert len(held.admit(ready, [unknown], 0.0)) == 4


@pytest.mark.parametrize("name", POLICIES["decode"])
@pytest.mark.parametrize("target", [None, 0.0161])
@pytest.mark.parametrize("seed", range(2))
def test_the_wait_for_a_row_has_a_bound(name: str, target: float | None, seed: int):
    """The k-th of the queue has a row when as many full rounds as come before it have ended."""
    chance = random.Random(seed)
    decode = policy(POLICIES["decode"][name], tpot_target=target)
    rows, longest = (4 if target is None else 3), 20
    queue = [sequence(i, chance.randint(1, 16), longest) for i in range(40)]
    place = {each: k for k, each in enumerate(queue)}
    running: dict[Sequence, int] = {}
    for tick in range(1000):
        view = decode_view(
            rows=4,
            free_rows=4 - len(running),
            free_pages=999,
            total_pages=999,
            token_times=times(0.01, 0.002),
        )
        for admission in decode.admit(queue, [view], 0.0):
            assert tick <= ceil(place[admission.sequence] / rows) * longest
            running[admission.sequence] = chance.randint(1, longest)
            queue.remove(admission.sequence)
        running = {each: left - 1 for each, left in running.items() if left > 1}
        if not queue:
            return
    raise AssertionError(f"{len(queue)} wait for ever")
