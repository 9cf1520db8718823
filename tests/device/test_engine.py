"""An engine: its role is data, a step's exports leave after their layer groups, and whatever goes
wrong is told by the ticket that it is of. Programs and transports here only note what is asked."""

import threading
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pdjax.core.ids import EngineId, PoolId
from pdjax.device.engine import JaxEngine, StepFuture
from pdjax.device.kv.transports import CancelledJobError, Transports
from pdjax.device.worker import DispatchWorker, Done
from pdjax.interfaces.steps import DecodeStep, PrefillStep, StepKind
from pdjax.interfaces.transport import TransferJob

HERE, THERE, ELSEWHERE = PoolId("hbm/prefill-0"), PoolId("hbm/decode-0"), PoolId("disk/0")
PAGES = np.array([1], np.int32)
GROUPS = (range(2), range(2, 4))


@dataclass
class Notes:
    """What is asked, in order, and by which thread; what is named in `fails` raises."""

    seen: list[tuple[str, int]] = field(default_factory=list)
    hold: threading.Event = field(default_factory=threading.Event)
    fails: dict[str, BaseException] = field(default_factory=dict)

    def note(self, what: str) -> None:
        self.seen.append((what, threading.get_ident()))
        if what in self.fails:
            raise self.fails[what]

    @property
    def names(self) -> list[str]:
        return [what for what, _ in self.seen]


class FakeProgram:
    """Steps of numbers; a prefill step of two groups."""

    def __init__(self, kind: StepKind, notes: Notes) -> None:
        self.kind, self.notes = kind, notes
        self.layer_groups = GROUPS if kind is StepKind.PREFILL else (range(4),)
        self.rows = 0 if kind is StepKind.PREFILL else 6
        self.losses = 2

    def dispatch(self, step: Any, after_group: Any) -> Any:
        self.notes.hold.wait(10)
        for group in range(len(self.layer_groups)):
            self.notes.note(f"step {step.batch} group {group}")
            after_group(group)
        return Done(step.batch)

    def set_history(self, row: int, token_ids: Any) -> None:
        self.notes.note(f"history {row}")

    def feed(self, row: int, tokens: Any, index: int) -> None:
        self.notes.note(f"feed {row} with {tokens}[{index}]")

    def close(self) -> None:
        self.notes.note("close program")


class Sent(Done[str]):
    """A job that has arrived."""

    read = Done(None)


class FakeTransport:
    """Moves nothing, between two pools."""

    def __init__(self, notes: Notes, *pools: PoolId) -> None:
        self.notes, self.pools, self.known = notes, pools or (HERE, THERE), set[int]()

    def connects(self, source: PoolId, target: PoolId) -> bool:
        return source != target and {source, target} <= set(self.pools)

    def writes_ahead(self, source: PoolId, target: PoolId) -> bool:
        return False

    def send(self, job: TransferJob) -> Any:
        self.notes.note(f"send {job.id}")
        self.known.add(job.id)
        return Sent("sent")

    def compile(self, job: TransferJob, target_pages: Any) -> Any:
        self.notes.note(f"compile for {len(target_pages)} pages")
        return Done(None)

    def write(self, job_id: int, target_pages: Any) -> Any:
        self.known.remove(job_id)
        self.notes.note(f"write {job_id}")
        return Done(0)

    def cancel(self, job_id: int) -> None:
        self.known.discard(job_id)

    def measure(self, source: PoolId, target: PoolId, nbytes: int) -> Any:
        return Done(1.0)

    def close(self) -> None:
        self.notes.note("close transport")


class House:
    """An engine and its transport, with a worker or without."""

    def __init__(
        self, *kinds: StepKind, worker: bool = False, fails: dict[str, BaseException] | None = None
    ) -> None:
        self.notes = Notes(fails=fails or {})
        self.worker = DispatchWorker() if worker else None
        self.transport = FakeTransport(self.notes)
        workers = {HERE: self.worker} if self.worker else {}
        self.transports: Any = Transports([self.transport], workers)
        pool: Any = SimpleNamespace(layout=None, num_pages=9, losses=3)
        pool.close = lambda: self.notes.note("close pool")
        programs: list[Any] = [
            FakeProgram(kind, self.notes) for kind in kinds or (StepKind.PREFILL,)
        ]
        id = EngineId("prefill/0")
        self.engine: Any = JaxEngine(id, HERE, pool, programs, self.transports, self.worker)
        if not worker:
            self.notes.hold.set()


def job(id: int, group: int = 0, source: PoolId = HERE, target: PoolId = THERE) -> TransferJob:
    return TransferJob(id, source, target, GROUPS[group], PAGES, 1)


def step(name: str, *exports: tuple[TransferJob, ...]) -> PrefillStep:
    return PrefillStep(name, exports)  # type: ignore[arg-type]


def tick(name: str) -> DecodeStep:
    return DecodeStep(name)  # type: ignore[arg-type]


both = pytest.mark.parametrize("worker", [False, True])


@pytest.mark.parametrize(
    ("kinds", "rows", "groups"),
    [
        ([StepKind.PREFILL], 0, GROUPS),
        ([StepKind.DECODE], 6, (range(4),)),
        ([StepKind.DECODE, StepKind.PREFILL], 6, GROUPS),
    ],
)
def test_a_role_is_data(kinds, rows, groups):
    engine = House(*kinds).engine
    assert (engine.accepts, engine.rows, engine.layer_groups) == (frozenset(kinds), rows, groups)
    assert engine.losses == 3 + 2 * len(kinds)
    for each in (step("p"), tick("d")):
        if each.kind in kinds:
            ticket: Any = engine.submit(each)
            assert ticket.result() == each.batch
        else:
            message = f"step.kind={each.kind.value}: engine prefill/0 takes {kinds[0].value} steps"
            with pytest.raises(ValueError, match=message):
                engine.submit(each)
    engine.accepts = frozenset()
    with pytest.raises(ValueError, match="takes no steps"):
        engine.submit(step("p"))


@both
def test_exports_leave_after_their_groups_and_before_the_next(worker):
    house = House(worker=worker)
    first = house.engine.submit(step("a", (job(1), job(2)), (job(3, 1),)))
    second = house.engine.submit(step("b", (), (job(4, 1),)))
    assert sorted(first.exports) == [1, 2, 3] and list(second.exports) == [4]
    if worker:
        assert not any(each.ready() or each.read.ready() for each in first.exports.values())
        assert not first.ready()
    house.notes.hold.set()
    assert second.result() == "b" and first.result() == "a"
    assert house.notes.names == [
        *("step a group 0", "send 1", "send 2", "step a group 1", "send 3"),
        *("step b group 0", "step b group 1", "send 4"),
    ]
    thread = threading.get_ident() if house.worker is None else house.worker.thread.ident
    assert {by for _, by in house.notes.seen} == {thread}
    assert first.exports[2].ready() and first.exports[2].read.ready()
    assert house.transports.write(2, PAGES).result() == 0
    assert house.transport.known == {1, 3, 4}


@both
def test_all_that_touches_a_pool_takes_its_turn(worker):
    house = House(worker=worker)
    house.engine.submit(step("a"))
    sent = house.transports.send(job(1))
    back = house.transports.send(job(2, source=THERE, target=HERE))
    house.engine.submit(step("b"))
    written = house.transports.write(2, PAGES)
    assert back.result() == "sent"
    house.notes.hold.set()
    assert written.result() == 0 and sent.ready() and sent.read.ready()
    house.transports.write(1, PAGES).result()
    steps = [name for name in house.notes.names if name != "send 2"]
    assert steps == [
        *("step a group 0", "step a group 1", "send 1"),
        *("step b group 0", "step b group 1", "write 2", "write 1"),
    ]
    if worker:  # the other pool has none
        here = threading.get_ident()
        assert [name for name, by in house.notes.seen if by == here] == ["send 2", "write 1"]


@both
def test_an_export_that_fails_fails_alone(worker):
    house = House(worker=worker, fails={"send 1": OSError("the link is down")})
    house.notes.hold.set()
    ticket = house.engine.submit(step("a", (job(1), job(2)), ()))
    assert ticket.result() == "a"
    assert ticket.exports[2].result() == "sent"
    assert ticket.exports[1].ready() and ticket.exports[1].read.ready()
    for call in (ticket.exports[1].result, ticket.exports[1].read.result):
        with pytest.raises(OSError, match="the link is down"):
            call()
    house.transports.cancel(1)
    house.engine.submit(step("b", (job(1),), ())).result()  # its id is free


@both
def test_a_step_that_fails_takes_its_later_exports_along(worker):
    house = House(worker=worker, fails={"step a group 1": RuntimeError("out of memory")})
    house.notes.hold.set()
    bad = house.engine.submit(step("a", (job(1),), (job(2, 1),)))
    good = house.engine.submit(step("b"))
    assert good.result() == "b"
    assert bad.ready()
    for failed in (bad, bad.exports[2], bad.exports[2].read):
        with pytest.raises(RuntimeError, match="out of memory"):
            failed.result()
    assert bad.exports[1].result() == "sent"
    assert "send 2" not in house.notes.names


def test_an_interrupt_while_a_step_is_dispatched_leaves_no_job():
    house = House(fails={"step a group 1": KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        house.engine.submit(step("a", (job(1),), (job(2, 1),)))
    assert house.transport.known == set()
    house.engine.submit(step("b", (job(1),), (job(2, 1),))).result()


def test_an_interrupt_while_a_step_is_handed_to_a_worker_hurts_no_other_step(monkeypatch):
    house = House(worker=True)
    assert house.worker is not None
    give = house.worker.give

    def interrupted(future):
        give(future)
        raise KeyboardInterrupt

    monkeypatch.setattr(house.worker, "give", interrupted)
    with pytest.raises(KeyboardInterrupt):
        house.engine.submit(step("a", (job(1),), ()))
    monkeypatch.undo()
    house.notes.hold.set()
    ticket = house.engine.submit(step("b", (job(1),), ()))
    assert ticket.result() == "b"
    assert house.notes.names.count("send 1") == 1


@both
def test_a_job_that_was_cancelled_never_leaves(worker):
    house = House(worker=worker)
    ticket = house.engine.submit(step("a", (job(1),), (job(2, 1),)))
    house.transports.cancel(1)
    house.transports.cancel(1)
    house.notes.hold.set()
    assert ticket.result() == "a" and ticket.exports[2].ready()
    assert house.transport.known == {2}
    assert ("send 1" in house.notes.names) is not worker  # or it had left before
    if worker:
        with pytest.raises(CancelledJobError, match="job 1 was cancelled before it left"):
            ticket.exports[1].result()
    for write in (house.transports.write, house.transports.write):
        with pytest.raises(ValueError, match="job_id=1: must be a job in flight"):
            write(1, PAGES)


@pytest.mark.parametrize(
    ("exports", "message"),
    [
        ([(job(1),)], "exports: 1 groups given; engine prefill/0 computes a step in 2"),
        ([(job(1),), (job(2),)], r"exports\[1\]: job 2 takes layers range\(0, 2\); must be some"),
        ([(job(1, source=THERE),), ()], r"exports\[0\]: job 1 reads pool hbm/decode-0; must be"),
        ([(job(1),), (job(1, 1),)], "job.id=1: must differ from the ids of all jobs in flight"),
        (
            [(job(1),), (job(2, 1, target=ELSEWHERE),)],
            "source=hbm/prefill-0, target=disk/0: no transport connects these pools",
        ),
    ],
)
def test_exports_that_cannot_be_are_refused_and_leave_nothing(exports, message):
    house = House()
    with pytest.raises(ValueError, match=message):
        house.engine.submit(step("a", *exports))
    assert house.notes.names == []
    ticket = house.engine.submit(step("b", (job(1),), (job(2, 1),)))
    assert ticket.exports[2].result() == "sent"


@both
def test_a_history_that_cannot_be_written_fails_the_next_step(worker):
    house = House(StepKind.DECODE, worker=worker, fails={"history 1": RuntimeError("lost")})
    house.notes.hold.set()
    house.engine.set_history(5, PAGES)
    for row in (-1, 6):
        with pytest.raises(ValueError, match=f"row={row}: engine prefill/0 has 6 rows"):
            house.engine.set_history(row, PAGES)
    if worker:
        house.engine.set_history(1, PAGES)
        failed = house.engine.submit(tick("a"))
        with pytest.raises(RuntimeError, match="lost"):
            failed.result()
    else:
        with pytest.raises(RuntimeError, match="lost"):
            house.engine.set_history(1, PAGES)
    assert house.engine.submit(tick("b")).result() == "b"
    assert house.notes.names == ["history 5", "history 1", "step b group 0"]


@both
def test_a_row_is_fed_in_its_turn_what_the_step_of_another_engine_chooses(worker):
    house = House(StepKind.DECODE, worker=worker, fails={"feed 1 with [7, 8][1]": OSError("lost")})
    house.notes.hold.set()
    chosen = StepFuture(lambda: SimpleNamespace(on_devices=[7, 8]), {})
    chosen.make()
    house.engine.submit(tick("a"))
    house.engine.feed(5, chosen, 0)
    with pytest.raises(ValueError, match="row=6: engine prefill/0 has 6 rows"):
        house.engine.feed(6, chosen, 0)
    with nullcontext() if worker else pytest.raises(OSError, match="lost"):
        house.engine.feed(1, chosen, 1)
    with pytest.raises(OSError, match="lost") if worker else nullcontext():
        house.engine.submit(tick("b")).result()
    assert house.notes.names[:2] == ["step a group 0", "feed 5 with [7, 8][0]"]


@both
def test_closing_waits_for_what_was_asked(worker):
    house = House(worker=worker)
    threading.Timer(0.05, house.notes.hold.set).start()
    house.engine.submit(step("a"))
    house.engine.close()
    house.transports.close()
    assert house.notes.names == [
        *("step a group 0", "step a group 1", "close pool", "close program", "close transport"),
    ]


def test_a_new_kind_of_link_is_one_more_transport():
    """Say, to a disk: jobs find it by the pools that it connects."""
    notes = Notes()
    near, far = FakeTransport(notes, HERE, THERE), FakeTransport(notes, HERE, ELSEWHERE)
    transports = Transports([near, far])
    assert transports.connects(HERE, THERE) and transports.connects(ELSEWHERE, HERE)
    assert not transports.connects(THERE, ELSEWHERE)
    for each in (job(1), job(2, target=ELSEWHERE)):
        transports.compile(each, PAGES).result()
        transports.send(each).result()
    assert (near.known, far.known) == ({1}, {2})
    assert transports.write(2, PAGES).result() == 0
    transports.cancel(1)
    assert (near.known, far.known) == (set(), set())
    with pytest.raises(ValueError, match="source=hbm/decode-0, target=disk/0: no transport"):
        transports.measure(THERE, ELSEWHERE, 1)
