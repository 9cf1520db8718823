"""What is told of prefixes that were looked for: found, or not, and why not."""

from dataclasses import asdict, replace

from pdjax.config import KVConfig
from pdjax.core.request import Request, SamplingParams
from pdjax.host.kv.prefix_account import KeyMemory, PrefixTotals
from tests.helpers.deployment import CONFIG, Deployment, deploy


def served(deployment: Deployment, name: str, first: int, salt: str | None = None) -> PrefixTotals:
    """What there is more to tell once a prompt of 18 tokens in pages of 4 has been served."""
    index = deployment.state(deployment.prefill[0]).pool.prefixes
    assert index is not None
    index.totals = PrefixTotals()
    prompt = tuple(first + i % 3 for i in range(18))
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    deployment.coordinator.submit(Request(name, prompt, params, 0.0, cache_salt=salt))
    deployment.run()
    assert index.totals.looked_up == 18
    return index.totals


def reasons(totals: PrefixTotals) -> dict[str, int]:
    told = {name: value for name, value in asdict(totals).items() if value}
    besides = totals.looked_up + totals.evicted_pages + totals.copied
    assert sum(told.values()) == totals.looked_up + besides
    del told["looked_up"]
    return told


def test_each_token_that_is_not_found_has_a_reason():
    deployment = deploy(replace(CONFIG, kv=KVConfig(prefix_cache=True)), pages=(8, 40))
    assert reasons(served(deployment, "a", 1)) == {"never_seen": 16, "partial": 2}
    again = served(deployment, "b", 1)
    assert reasons(again) == {"hit": 17, "partial": 1, "copied": 1}
    assert (again.rate, again.ceiling) == (17 / 18, 17 / 18)
    other = served(deployment, "c", 4)
    assert reasons(other) == {"never_seen": 16, "partial": 2, "evicted_pages": 2}
    gone = served(deployment, "d", 1)
    assert (gone.hit, gone.evicted, gone.partial) == (8, 8, 2)
    assert (gone.rate, gone.ceiling) == (8 / 18, 16 / 18)


def test_what_another_salt_has_is_isolated():
    deployment = deploy(replace(CONFIG, kv=KVConfig(prefix_cache=True)))
    assert reasons(served(deployment, "a", 1)) == {"never_seen": 16, "partial": 2}
    assert reasons(served(deployment, "b", 1, "x")) == {"isolated": 16, "partial": 2}
    assert reasons(served(deployment, "c", 1, "y")) == {"isolated": 16, "partial": 2}
    assert reasons(served(deployment, "d", 1, "y")) == {"hit": 17, "partial": 1, "copied": 1}
    assert reasons(served(deployment, "e", 4, "y")) == {"never_seen": 16, "partial": 2}
    assert reasons(served(deployment, "f", 4)) == {"isolated": 16, "partial": 2}


def test_nothing_is_told_before_the_first():
    told = PrefixTotals().to_json()
    assert told["prefix_rate"] is told["prefix_ceiling"] is None
    assert told["prefix_hit"] == 0


def test_old_keys_are_forgotten():
    memory = KeyMemory(2)
    for key in (b"a", b"b", b"c"):
        memory.add([key])
    assert all(key in memory for key in (b"a", b"b", b"c"))
    memory.add([b"d", b"e", b"f"])
    assert b"a" not in memory and b"f" in memory
