"""The queue of sequences, beside a sorted list."""

import random
from bisect import insort
from operator import attrgetter

import pytest

from pdjax.host.policies.orders.fair import tenant_of
from pdjax.host.sequences.queue import SequenceQueue
from pdjax.host.sequences.sequence import Sequence
from tests.helpers.deployment import CONFIG, deploy
from tests.helpers.views import sequence


def drawn(chance: random.Random, order: int) -> Sequence:
    labels = {"tenant": chance.choice("abc")}
    asked = {"priority": chance.randint(0, 5), "labels": labels}
    return sequence(order, chance.randint(1, 9), asked=asked)


@pytest.mark.parametrize("seed", range(2))
def test_it_is_as_a_sorted_list(seed):
    chance, queue, plain = random.Random(seed), SequenceQueue(tenant_of), list[Sequence]()
    rank = attrgetter("request.priority")
    for order in range(2000):
        if plain and chance.random() < 0.3:
            gone = chance.choice((plain[0], plain[-1], chance.choice(plain)))
            queue.remove(gone)
            plain.remove(gone)
        else:
            made = drawn(chance, order)
            queue.add(made, rank(made))
            insort(plain, made, key=rank)
        if plain and order % 50 == 0:
            some = chance.choice(plain)
            at = plain.index(some)
            assert queue.tokens_before(some) == sum(each.length for each in plain[:at])
            assert queue[at] is some and queue[at - len(plain)] is some
            assert queue[at : at + 5] == plain[at : at + 5] and queue[::-1] == plain[::-1]
            assert queue.index(some) == at and some in queue and len(queue) == len(plain)
    assert list(queue) == plain
    for tenant, its in queue.groups.items():
        assert list(its) == [each for each in plain if tenant_of(each) == tenant]
    while queue:
        queue.remove(queue[0])
    assert not queue.groups and list(queue) == []


def test_what_is_not_there():
    queue, other = SequenceQueue.of([sequence(0, 1)]), sequence(1, 1)
    queue.discard(other)
    for missing in (queue.remove, queue.tokens_before):
        with pytest.raises(KeyError):
            missing(other)
    for index in (1, -2):
        with pytest.raises(IndexError, match=f"^index={index}: the queue holds 1 sequences$"):
            queue[index]
    with pytest.raises(ValueError, match=r"^groups: "):
        _ = queue.groups


def test_a_rank_beside_another_kind_of_rank_changes_nothing():
    queue, other = SequenceQueue.of([sequence(0, 1)], rank=lambda _: 1), sequence(1, 1)
    with pytest.raises(TypeError):
        queue.add(other, (1, 2))
    assert len(queue) == 1 and other not in queue


def test_a_long_queue_is_left_from_any_place_by_few_comparisons():
    class Rank(float):
        compared = 0

        def __lt__(self, other: float) -> bool:
            Rank.compared += 1
            return super().__lt__(other)

        def __eq__(self, other: object) -> bool:
            Rank.compared += 1
            return super().__eq__(other)

        __hash__ = float.__hash__

    chance, count = random.Random(1), 4000
    queued = [sequence(order, 1) for order in range(count)]
    queue = SequenceQueue()
    for each in chance.sample(queued, count):
        queue.add(each, Rank(each.order))
    Rank.compared = 0
    for each in chance.sample(queued, 500):
        queue.remove(each)
    assert Rank.compared < 500 * 60


def test_any_of_a_long_queue_can_be_aborted():
    deployment = deploy(CONFIG)
    names = [f"r{i}" for i in range(CONFIG.max_waiting)]
    for name in names:
        deployment.submit(name)
    random.Random(2).shuffle(names)
    assert all(map(deployment.coordinator.abort, names))
    assert not deployment.coordinator.loop.lifecycle.waiting
    deployment.run()
    deployment.coordinator.check()
