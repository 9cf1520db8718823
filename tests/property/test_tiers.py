"""Random conversations over pools that are too small for them, with a tier below: what goes down
and comes up again is right, bit for bit, and no page is lost in any pool."""

import random
from dataclasses import replace

from tests.helpers.walks import run_all
from tests.helpers.workload import Visit, Workload


class Conversations(Workload):
    """A workload of many turns of a few conversations. Its pools keep prefixes, and have a tier
    with room for more of them."""

    tier_rate = 1.0

    def __init__(self, seed: int, *, faults: bool = False) -> None:
        self._turns = random.Random(f"turns in {seed}")
        super().__init__(seed, faults=faults)
        self.visits += [self._visit(f"t{i}") for i in range(12)]

    def _draw_prefix_cache(self) -> bool:
        return True

    def _visit(self, name: str) -> Visit:
        visit, turns = super()._visit(name), self._turns
        most = self.max_model_len - 1
        whole = [(7 * turns.randrange(3) + i) % 11 for i in range(most)]
        prompt = tuple(whole[: turns.randint(max(1, most // 2), most)])
        visit.request = replace(visit.request, prompt_token_ids=prompt, cache_salt=None)
        visit.at_step = turns.randint(0, 120)
        return visit


class LowerTiers(Conversations):
    """The same over two small tiers, of which the lower one may lose pages."""

    lower_tiers = True


def test_tokens_pages_and_progress():
    happened = run_all(range(60_002, 60_009), make=Conversations)
    for what in ("down_pages", "up_pages", "refreshed_pages", "refused_pages", "hit_tokens"):
        assert happened[f"tier_{what}"], f"never happened: {what}"
    assert not happened["tier_failed_pages"]


def test_faults_hurt_nobody_else():
    happened = run_all(range(60_030, 60_037), faults=True, make=Conversations)
    assert happened["tier_failed_pages"]  # loads that fail are in tests/host/test_tiers.py


def test_a_tier_below_a_tier():
    happened = run_all(range(60_006, 60_009), make=LowerTiers)
    assert happened["host/0 hit_tokens"] and happened["disk/0 hit_tokens"]
    run_all(range(60_053, 60_055), faults=True, make=LowerTiers)
