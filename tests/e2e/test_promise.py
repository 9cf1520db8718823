"""The promise: disaggregated tokens equal monolithic tokens, exactly, for every pair of layouts."""

import random
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pdjax.core.ids import PoolId
from pdjax.core.request import SamplingParams
from pdjax.host.sequences.sequence import State
from pdjax.interfaces.tickets import Ticket
from pdjax.interfaces.transport import TransferJob, TransferTicket, Transport
from pdjax.llm import LLM
from tests.helpers.promise import (
    COLD,
    MONOLITHIC,
    answers,
    conserved,
    crowded,
    disaggregated,
    expected,
    expected_of_a_crowd,
    preemptions,
    workload,
)

pytestmark = pytest.mark.usefixtures("few_variants")

LAYOUTS = [
    (2, 1, 1),
    (2, 3, 2),
    (3, 2, 2),
    (4, 4, 2),
    (1, 5, 1),
]
"""Beside those of the other tests: (1, 1, 1), (1, 2, 1), (1, 3, 1) and (2, 2, 1). So every tp of
prefill and every number of stages is there; both tps of decode meet 2 and 3 stages."""


@pytest.mark.parametrize(("tp_p", "stages", "tp_d"), LAYOUTS)
def test_token_exact(tp_p, stages, tp_d):
    groups = (1, 2, 3, 5)[(tp_p + stages) % 4]
    sizes = {"decode.row_buckets": (1,)} if stages == 3 else {}
    with LLM(disaggregated(tp_p, stages, tp_d, groups), COLD | sizes) as llm:
        assert answers(llm) == expected()
        totals = llm.recorder.transfers
        assert totals.transfers > 0 and totals.shipments > 0
        assert (totals.layout_changing_puts, totals.reprefilled_tokens) == (0, 0)
        few = 4 if sizes else 1
        for (prompt, params), tokens in list(zip(workload(), expected(), strict=True))[:few]:
            [alone] = llm.generate([prompt], params)  # its row may run ahead
            assert [choice.token_ids for choice in alone.choices] == tokens


VARIANTS: dict[str, dict[str, Any]] = {
    "in bulk, by a thread": {
        "handoff.streaming": False,
        "prefill.engines": 2,
        "prefill.dispatch_thread": True,
    },
    "on the same devices": {"shared_devices": True},
    "larger pages": {"decode.page_size": 8},
    "smaller pages, checked, little at once": {
        "decode.page_size": 1,
        "decode.page_buckets": (64,),
        "handoff.checksums": True,
        "handoff.max_bytes_in_flight": 1,
    },
    "tokens first, and short ones stay": {"handoff.after_tokens": 3, "handoff.stay_below": 9},
    "back, to what is kept": {"kv.prefix_cache": True, "handoff.give_back": True},
    "back, by a thread": {
        "kv.prefix_cache": True,
        "handoff.give_back": True,
        "prefill.dispatch_thread": True,
    },
    "few rows a tick": {"decode.row_buckets": (1,)},
    "sideways": {"decode.engines": 2, "handoff.rebalance": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_no_way_of_moving_changes_a_token(name):
    with LLM(disaggregated(2, 2, 1, 3), COLD | VARIANTS[name]) as llm:
        assert answers(llm) == expected()
        if "kv.prefix_cache" in VARIANTS[name]:
            assert answers(llm) == expected()  # now from what is kept
            assert llm.recorder.transfers.pages_skipped > 0
        assert llm.recorder.transfers.layout_changing_puts == 0


class Unreliable:
    """A transport that fails now and then, damages what it moves, or never delivers it: each kind
    of trouble strikes one of every 20 calls, drawn by the seed, so that none stays away, however
    many calls the clock makes of it."""

    def __init__(self, transport: Transport, seed: int) -> None:
        self._transport, self._random = transport, random.Random(seed)
        self.connects, self.measure = transport.connects, transport.measure
        self.cancel, self.close = transport.cancel, transport.close
        self.troubles: Counter[str] = Counter()
        self._drawn: defaultdict[str, list[bool]] = defaultdict(list)

    def writes_ahead(self, source: PoolId, target: PoolId) -> bool:
        return False  # a device would wait for ever for what never comes

    def _trouble(self, kind: str) -> bool:
        drawn = self._drawn[kind]
        if not drawn:
            drawn += [True] + [False] * 19
            self._random.shuffle(drawn)
        struck = drawn.pop()
        self.troubles[kind] += struck
        return struck

    def send(self, job: TransferJob) -> TransferTicket:
        if self._trouble("send"):
            raise OSError("the link is down")
        ticket: Any = self._transport.send(job)
        if self._trouble("lost"):
            ticket.ready = lambda: False
        if self._trouble("damaged"):
            ticket.pieces[0][0] = ticket.pieces[0][0] ^ 1
        return ticket

    def write(self, job_id: int, target_pages: np.ndarray) -> Ticket[int]:
        if self._trouble("write"):
            raise OSError("the link is down")
        return self._transport.write(job_id, target_pages)


@pytest.mark.parametrize("thread", [False, True])
def test_a_storm_loses_nothing(thread):
    """Failures, damage, losses and aborts all the time: every request that is not hurt for good has
    the right tokens, and nothing leaks."""
    config = disaggregated(1, 3, 1, 3)
    config = replace(config, prefill=replace(config.prefill, dispatch_thread=thread))
    changes = {"handoff.checksums": True, "handoff.deadline": 0.05, "handoff.retries": 2}
    changes |= {"handoff.reprefills": 3, "kv.prefix_cache": True}
    with LLM(config, changes) as llm:
        transports = llm.deployment.backing.transport.transports
        [transport] = transports
        storm = Unreliable(transport, seed=5)
        transports[0] = storm
        draw, outcomes = random.Random(7), Counter[str]()
        for _ in range(5):
            ids = [llm.submit(prompt, params) for prompt, params in workload()]
            victims = {id: draw.randint(1, 40) for id in draw.sample(ids, 3)}
            while llm.has_work:
                llm.step()
                llm.coordinator.check()
                victims = {id: left - 1 for id, left in victims.items()}
                for id in [id for id, left in victims.items() if left == 0]:
                    llm.abort(id)
            for id, tokens in zip(ids, expected(), strict=True):
                answer = llm.take_output(id)
                assert answer is not None
                for choice, right in zip(answer.choices, tokens, strict=True):
                    outcomes[choice.finish_reason or ""] += 1
                    assert choice.token_ids == right[: len(choice.token_ids)]
                    if choice.finish_reason in ("stop", "length"):
                        assert choice.token_ids == right
        conserved(llm)
        assert all(storm.troubles[kind] for kind in ("send", "lost", "damaged", "write"))
        assert outcomes["length"] + outcomes["stop"] > 40
        assert outcomes["abort"] > 0


@pytest.mark.smoke
def test_token_exact_smoke():
    with LLM(disaggregated(2, 2, 1), COLD) as llm:
        assert answers(llm) == expected()


def test_several_engines_of_each_kind():
    # Of one device each, so that they share their programs. "sideways" has larger ones.
    config = disaggregated(1, 1, 1, engines=2, rows=2)
    config = replace(config, prefill=replace(config.prefill, engines=2))
    with LLM(config, COLD) as llm:
        assert answers(llm) == expected()
        tracks = set(llm.recorder.engines)
    assert {"prefill/0", "prefill/1", "decode/0", "decode/1"} <= tracks


@pytest.mark.parametrize("lookahead", [0, 3])
def test_lookahead_changes_nothing(lookahead):
    config = disaggregated(1, 3, 1, 3, lookahead=lookahead)
    config = replace(config, prefill=replace(config.prefill, lookahead=lookahead))
    with LLM(config, COLD) as llm:
        assert answers(llm) == expected()


@pytest.mark.parametrize("stages", [1, 3])
def test_preemption_changes_nothing(stages):
    # 14 pages of 4 tokens hold one of the long sequences, and little beside it.
    with LLM(disaggregated(1, stages, 1, stages, pages=15), COLD) as llm:
        assert answers(llm) == expected()
        assert crowded(llm) == expected_of_a_crowd()
        assert preemptions(llm) > 0


@pytest.mark.parametrize("tp", [1, 2])
def test_mixed_steps_change_nothing(tp):
    mixing = {"prefill.mixed_budget": 8, "prefill.tp": tp, "decode.tp": tp}
    with LLM(MONOLITHIC, COLD | mixing | {"decode.row_buckets": (1,)}) as llm:
        assert answers(llm) == expected()
        spans = llm.recorder.spans()
        steps, ticks = ({s.start for s in spans if s.name == name} for name in ("step", "tick"))
        assert steps & ticks and steps - ticks and ticks - steps


FLEXIBLE: dict[str, dict[str, Any]] = {
    "two to decode, found again": {
        "flexible": "all",
        "policies.local_tokens": 40,
        "policies.tpot_target": 1e-9,
        "decode.engines": 2,
        "kv.prefix_cache": True,
    },
    # On the mesh of the mixed steps above, whose programs these are.
    "on a mesh": {"policies.local_tokens": 40, "decode.tp": 2, "shared_devices": True},
}


@pytest.mark.parametrize("name", FLEXIBLE)
def test_where_a_prompt_is_prefilled_changes_nothing(name):
    changes: dict[str, Any] = {"flexible": "decode", "policies.placement": "conditional"}
    changes |= {"prefill.mixed_budget": 8, "decode.row_buckets": (1,)} | FLEXIBLE[name]
    with LLM(disaggregated(1, 1, 1, groups=1), COLD | changes) as llm:
        assert answers(llm) == expected()
        if "kv.prefix_cache" in changes:
            assert answers(llm) == expected()  # now from what is kept
        recorder = llm.recorder
    assert recorder.transfers.transfers > 0 and recorder.transfers.layout_changing_puts == 0
    assert recorder.local_prefills > 0 and recorder.remote_prefills > 0


def test_colocated_on_a_mesh_changes_nothing():
    config = replace(
        MONOLITHIC,
        prefill=replace(MONOLITHIC.prefill, tp=2),
        decode=replace(MONOLITHIC.decode, tp=2),
    )
    with LLM(config, COLD) as llm:
        assert answers(llm) == expected()
        assert llm.recorder.transfers.bytes == 0


@pytest.mark.parametrize("budget", [None, 8])
def test_replicas_change_nothing(budget):
    several = {"prefill.engines": 2, "decode.engines": 2, "prefill.mixed_budget": budget}
    with LLM(MONOLITHIC, COLD | several) as llm:
        assert answers(llm) == expected()
        assert llm.recorder.transfers.transfers == 0
        ticked = {span.track for span in llm.recorder.spans() if span.name == "tick"}
        assert len(ticked) == 2


@pytest.mark.parametrize(
    "state",
    [State.WAITING, State.PREFILLING, State.PREFILLED, State.TRANSFERRING, State.DECODING],
)
def test_abort_hurts_nobody_else(state, two_stages):
    llm, work = two_stages, workload()
    neighbours = [llm.submit(prompt, params) for prompt, params in work]
    victim = llm.submit([9] * 18, SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))
    [sequence] = llm.sequences(victim)
    while sequence.state is not state:
        llm.step()
    llm.abort(victim)
    conserved(llm)

    aborted = llm.take_output(victim)
    assert aborted is not None
    assert aborted.finish_reason == "abort"
    assert (aborted.token_ids == []) == (state in (State.WAITING, State.PREFILLING))
    outputs = [llm.take_output(neighbour) for neighbour in neighbours]
    assert [[c.token_ids for c in output.choices] for output in outputs] == expected()


@pytest.fixture(scope="module")
def two_stages():
    with LLM(disaggregated(1, 2, 1, rows=2), COLD) as llm:
        yield llm
