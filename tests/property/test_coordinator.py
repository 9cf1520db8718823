"""Random walks over the coordinator: whatever happens, every sequence gets the tokens that it would
have got alone, every page comes back, and nobody waits for ever."""

import os
from collections.abc import Callable

import pytest

from pdjax.core.roles import Role
from pdjax.host.batching.decode_pipeline import DecodePipeline
from pdjax.host.handoff import transfer
from pdjax.host.handoff.handoff import Handoff, Part
from pdjax.host.kv.prefix_index import PrefixIndex
from pdjax.host.loop import Loop
from pdjax.host.policies.registry import POLICIES
from pdjax.host.runners import prefill
from pdjax.host.runners.decode import DecodeRunner
from pdjax.host.sequences.reference import SequenceRef
from pdjax.host.sequences.sequence import Sequence, State
from tests.helpers.fake_transport import FakeTransport
from tests.helpers.fakes import Chance, FakeTicket
from tests.helpers.turmoil import Turmoil
from tests.helpers.walks import run_all
from tests.helpers.workload import REACHED

SHARDS = int(os.environ.get("PDJAX_WALK_SHARDS", 5))
"""PDJAX_WALK_SHARDS=1000 takes an hour."""
SEEDS = 30
"""Workloads a shard."""

Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize("shard", range(SHARDS))
def test_tokens_pages_and_progress(shard):
    run_all(range(shard * SEEDS, (shard + 1) * SEEDS))


@pytest.mark.parametrize("shard", range(SHARDS))
def test_faults_hurt_nobody_else(shard):
    run_all(range(shard * SEEDS, (shard + 1) * SEEDS), faults=True)


@pytest.mark.parametrize("faults", [False, True])
def test_plans_that_are_overtaken_hurt_nobody(faults):
    happened = run_all(range(50_000, 50_020), faults=faults, make=Turmoil)
    wanted = {f"{what} before a step" for what in ("preempted", "lost", "taken")}
    assert wanted <= happened.keys(), f"never happened: {wanted - happened.keys()}"


@pytest.mark.smoke
def test_the_workloads_cover_what_may_happen():
    seeds = range(20_200, 20_260)
    happened = run_all(seeds) + run_all(seeds, faults=True)
    wanted = {"refused", "queue full", "preempted", "faults", "interrupted"}
    wanted |= {"lost", "damaged", "retries", "pages_skipped", "reprefilled_tokens", "transfers"}
    wanted |= {"prefill to decode", "decode to prefill", "decode to decode"}
    wanted |= {"mixed steps", "FINISHED", "ABORTED", "FAILED", "poisoned", "prompt scored"}
    wanted |= {"copied", "pinned", "pins refused"}
    wanted |= {"SHED", "prefilled where others decode"}
    wanted |= {f"mixed engine for {role.value}" for role in Role}
    wanted |= {"masked", "masked and preempted", "masks late"}
    wanted |= {f"abort in {state.name}" for state in REACHED - {State.LOADING}}
    wanted |= {f"{role} {name}" for role, names in POLICIES.items() for name in names}
    assert wanted <= happened.keys(), f"never happened: {wanted - happened.keys()}"


# Tests of the test: bugs that were made, or could be, must come out as wrong tokens alone, without
# anybody counting pages.


def parts_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence decodes when something of it has landed, not when all of it has."""
    monkeypatch.setattr(
        Handoff, "complete", property(lambda self: bool((self._ledger == Part.WRITTEN).any()))
    )


def unwanted_pages_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """What arrives for a hand-off that has been closed is written to pages that it had."""
    monkeypatch.setattr(transfer.Item, "wanted", property(lambda self: True))


def last_page_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last page of a prompt, partly filled, is not sent."""
    monkeypatch.setattr(Handoff, "spans", property(lambda self: max(1, self.tokens // self.span)))


def sent_before_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A span leaves when its first token has been computed, not its last."""
    sendable = Handoff.sendable
    monkeypatch.setattr(
        Handoff, "sendable", lambda self, computed: sendable(self, computed + self.span - 1)
    )


def damage_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages whose checksums differ are taken for good."""
    write = FakeTransport.write

    def write_and_say_nothing(self, job_id, target_pages) -> FakeTicket[int]:
        write(self, job_id, target_pages)
        return FakeTicket(0, Chance(0))

    monkeypatch.setattr(FakeTransport, "write", write_and_say_nothing)


def newest_token_found_in_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page of a token that nothing has been written of yet is made findable."""
    insert = PrefixIndex.insert

    def insert_more(self, keys, pages, tokens) -> None:
        insert(self, keys, pages, min(tokens + 1, len(keys) * self.page_size))

    monkeypatch.setattr(PrefixIndex, "insert", insert_more)


def stale_epoch_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that was on its way when the sequence was preempted is taken all the same."""
    monkeypatch.setattr(SequenceRef, "is_current", property(lambda self: not self.sequence.done))


def masked_rows_run_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row with a mask is launched though its last token is not known yet."""
    bound = DecodePipeline._bound

    def not_bound(self, place, sequence) -> None:
        bound(self, place, sequence)
        self._last[place] = sequence.lifetime_tokens - 1

    monkeypatch.setattr(DecodePipeline, "_bound", not_bound)


def masks_of_the_token_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence goes on with the mask that it had, while the next one is being worked out."""
    monkeypatch.setattr(Sequence, "behind", False)


def page_grown_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page is added one position after it is needed."""
    needing_page = DecodePipeline.needing_page

    def one_less(self) -> list[Sequence]:
        self._next -= 1
        found = needing_page(self)
        self._next += 1
        return found

    monkeypatch.setattr(DecodePipeline, "needing_page", one_less)


def dropped_row_left_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is given up runs on through the later stages, and writes to its old pages."""
    release = DecodePipeline.release

    def release_but_go_on(self: DecodePipeline, row: int) -> None:
        microbatch = row // self._size
        flight = self._flights[microbatch]
        release(self, row)
        self._flights[microbatch] = flight

    monkeypatch.setattr(DecodePipeline, "release", release_but_go_on)


def evicted_pages_still_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index does not hear that a page has been given to somebody else."""
    monkeypatch.setattr(PrefixIndex, "_forget_all", lambda self, pages: None)


def histories_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is not told the tokens of a penalized sequence before it joins."""
    monkeypatch.setattr(DecodeRunner, "_let_in", lambda self, state, joining: None)


def poison_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages of a sequence whose logits are not finite stay findable."""
    monkeypatch.setattr(PrefixIndex, "forget_key", lambda self, key: None)
    monkeypatch.setattr(prefill, "NOT_FINITE", None)


def prompt_scored_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the prefix cache is not computed, though its log-probabilities are wanted."""
    monkeypatch.setattr(Sequence, "reusable", property(lambda self: self.length - 1))


def losses_not_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who had KV in a pool that was lost goes on with the empty one."""
    monkeypatch.setattr(Loop, "_notice_losses", lambda self, states: None)


@pytest.mark.parametrize(
    "bug",
    [
        parts_not_counted,
        unwanted_pages_written,
        last_page_left_behind,
        sent_before_computed,
        damage_ignored,
        newest_token_found_in_cache,
        stale_epoch_believed,
        masked_rows_run_ahead,
        masks_of_the_token_before,
        page_grown_late,
        dropped_row_left_in_flight,
        evicted_pages_still_found,
        histories_not_set,
        losses_not_noticed,
        prompt_scored_in_part,
        poison_kept,
    ],
)
def test_bugs_are_caught(bug: Patch, monkeypatch: pytest.MonkeyPatch):
    bug(monkeypatch)

    def walks() -> None:
        for faults in (True, False):  # with them there is more that can go wrong
            run_all(range(30_400, 30_700), faults=faults, check=False)

    with pytest.raises(AssertionError, match="seed"):
        walks()
