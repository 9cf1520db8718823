"""Engines that a thread asks: everything in the order of the calls, nobody waits, errors are the
ticket's."""

import subprocess
import sys
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from pdjax.device.worker import Order, Orders, on_threads
from pdjax.interfaces.transfer import End, Shipment, Side

SOURCE, TARGET = End(Side.PREFILL, 0), End(Side.DECODE, 0)
PAGES = np.array([1], np.int32)


@dataclass
class Ticket:
    """Ready at once."""

    outcome: Any
    shipment: Any = None

    def ready(self) -> bool:
        return True

    def gathered(self) -> bool:
        return True

    def result(self) -> Any:
        return self.outcome


@dataclass
class Device:
    """Both an engine of two layer groups and a transfer: takes down what it is asked, where."""

    seen: list[tuple[str, int]] = field(default_factory=list)
    hold: threading.Event = field(default_factory=threading.Event)
    fails_at: str = ""
    layout: Any = None
    num_pages: int = 3
    layer_groups: tuple[range, ...] = (range(1), range(1, 2))

    def _note(self, what: str) -> None:
        self.seen.append((what, threading.get_ident()))
        if what == self.fails_at:
            raise RuntimeError(what)

    def prefill(self, batch, after_group=None):
        self.hold.wait(10)
        for group in (0, 1):
            self._note(f"{batch} {group}")
            after_group(group)
        return Ticket(batch)

    def send(self, shipment):
        self._note(f"send {shipment.layers.start}")
        return Ticket("sent", shipment)

    def land(self, ticket, target_pages):
        assert isinstance(ticket, Ticket)
        self._note(f"land {ticket.shipment.layers.start}")
        return Ticket(0)

    def shares_pool(self, source, target):
        return source == target

    def probe(self, source, target, nbytes):
        return 1.0


def shipment(group: int, source: End = SOURCE, target: End = TARGET) -> Shipment:
    return Shipment(source, target, range(group, group + 1), PAGES, 1)


def make(fails_at: str = "") -> tuple[Device, Any, Any]:
    device: Any = Device(fails_at=fails_at)
    [engine], transfer = on_threads([device], device)
    return device, engine, transfer


def names(device: Device) -> list[str]:
    return [what for what, _ in device.seen]


def test_what_is_sent_after_a_group_leaves_before_the_next_one():
    device, engine, transfer = make()
    sent: list[Any] = []
    first = engine.prefill("first", lambda g: sent.append(transfer.send(shipment(g))))
    second = engine.prefill("second")
    assert len(sent) == 2 and not first.ready() and not sent[0].ready() and not sent[0].gathered()
    device.hold.set()
    assert second.result() == "second" and first.result() == "first"
    assert names(device) == ["first 0", "send 0", "first 1", "send 1", "second 0", "second 1"]
    assert {thread for _, thread in device.seen}.isdisjoint({threading.get_ident()})
    assert sent[1].ready() and sent[1].gathered() and sent[1].shipment.layers == range(1, 2)


def test_pools_without_a_thread_are_written_at_once_and_others_in_their_turn():
    device, engine, transfer = make()
    device.hold.set()
    sent = transfer.send(shipment(0))
    sent.result()
    assert transfer.land(sent, PAGES).result() == 0
    back = transfer.send(shipment(1, TARGET, SOURCE))
    engine.prefill("after")
    transfer.land(back, PAGES).result()
    here = threading.get_ident()
    by_me = [what for what, thread in device.seen if thread == here]
    assert by_me == ["land 0", "send 1"]
    assert names(device)[-3:] == ["after 0", "after 1", "land 1"]


def test_an_error_is_the_tickets_and_hurts_nobody_else():
    device, engine, transfer = make(fails_at="bad 0")
    device.hold.set()
    sent: list[Any] = []
    bad = engine.prefill("bad", lambda g: sent.append(transfer.send(shipment(g))))
    good = engine.prefill("good")
    assert good.result() == "good"
    with pytest.raises(RuntimeError, match="bad 0"):
        bad.result()
    with pytest.raises(RuntimeError, match="bad 0"):
        bad.ready()
    assert [each.result() for each in sent] == ["sent", "sent"]


def test_a_shipment_that_cannot_be_sent_was_not_gathered():
    _, _, transfer = make(fails_at="send 0")
    sent = transfer.send(shipment(0))
    with pytest.raises(RuntimeError, match="send 0"):
        sent.result()
    assert not sent.gathered()


def test_the_rest_of_a_step_goes_on_where_its_listener_fails():
    device, engine, _ = make()
    device.hold.set()

    def listen(group: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.prefill("first", listen)
    assert engine.prefill("second").result() == "second"
    assert names(device) == ["first 0", "first 1", "second 0", "second 1"]


def test_a_key_pressed_while_a_step_is_handed_over_stops_nobody(monkeypatch):
    device, engine, _ = make()
    device.hold.set()
    give = engine.orders.give

    def interrupted(order):
        give(order)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.orders, "give", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.prefill("first", lambda group: None)
    monkeypatch.undo()
    assert engine.prefill("second").result() == "second"
    assert names(device) == ["first 0", "first 1", "second 0", "second 1"]


def test_rest_waits_for_all_that_was_asked():
    device, engine, transfer = make()
    device.hold.set()
    engine.prefill("first", lambda group: transfer.send(shipment(group)))
    engine.rest()
    assert names(device) == ["first 0", "send 0", "first 1", "send 1"]


def test_nobody_waits_for_a_thread_that_has_ended():
    device, engine, _ = make()
    device.hold.set()
    last = engine.prefill("last")
    engine.orders.end(10)
    assert last.result() == "last"
    engine.rest()


def test_the_thread_ends_with_those_who_could_ask_it():
    orders = Orders()
    device = Device()
    kept = weakref.ref(device)
    order = Order(lambda device=device: Ticket(device.num_pages))  # type: ignore[misc]
    orders.give(order)
    assert order.result() == 3
    [thread] = [each for each in threading.enumerate() if each is orders.thread]
    del orders, device, order
    assert kept() is None
    thread.join(10)
    assert not thread.is_alive()


def test_an_interrupt_at_the_end_of_the_process_waits_for_the_thread():
    """Or Python would stop it wherever it is, and within XLA that aborts."""
    program = """
import atexit, os, signal, sys, threading, time
from pdjax.device.worker import Order, Orders

ends = threading.Event()

def work():
    ends.wait()
    for _ in range(3):
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
    print("carried out", flush=True)

orders = Orders()
orders.give(Order(work))
atexit.register(ends.set)
sys.exit(3)
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=50
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (3, "carried out\n", "")
