"""Engines that are dispatched by a thread of their own, so that decode need not wait until a step
of prefill, and what it sends, has been dispatched.

To dispatch is the host's work: XLA launches a program's kernels from the thread that calls it,
which takes a millisecond or two for a layer group of a large model, and a token of decode that
comes meanwhile is seen so much later. XLA lets go of Python's lock while it launches: two threads,
each for devices of its own, hardly wait for one another.

Whatever an engine is asked, and whatever is read from its pool or written to it, goes through one
queue in the order of the calls. So the promises of `interfaces` hold, and nothing else here needs a
lock. What was asked for after a group of a step that fails is sent all the same, and means nothing:
nobody is seated before the step's own ticket has been read. Moments that the host takes down are
those at which it has asked.
"""

import atexit
import signal
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from pdjax.interfaces.batches import Array, PrefillBatch, Sampled
from pdjax.interfaces.engine import PrefillEngine
from pdjax.interfaces.tickets import Ticket
from pdjax.interfaces.transfer import End, Shipment, Side, Transfer, TransferCost, TransferTicket

ResultT = TypeVar("ResultT")


class Order(Generic[ResultT]):
    """A call that is to be made by another thread, and the ticket of the work that it dispatches.
    An error of the call is the work's."""

    def __init__(self, call: Callable[[], Ticket[ResultT]]) -> None:
        self._call: Callable[[], Ticket[ResultT]] | None = call
        self._made = threading.Event()
        self._ticket: Ticket[ResultT] | None = None
        self._error: BaseException | None = None

    def carry_out(self) -> None:
        """Make the call; once."""
        assert self._call is not None
        try:
            self._ticket = self._call()
        except BaseException as error:
            self._error = error
        self._call = None  # and what it holds
        self._made.set()

    @property
    def ticket(self) -> Ticket[ResultT]:
        """Of the work; waits for the call.

        Raises:
          BaseException: what the call has raised.
        """
        self._made.wait()
        if self._error is not None:
            raise self._error
        assert self._ticket is not None
        return self._ticket

    def wait(self, seconds: float) -> bool:
        """Wait so long at most for the call; whether it has been made."""
        return self._made.wait(seconds)

    def ready(self) -> bool:
        return self._made.is_set() and self.ticket.ready()

    def result(self) -> ResultT:
        return self.ticket.result()


class ShipmentOrder(Order[TransferCost]):
    """The order to send a shipment."""

    def __init__(self, call: Callable[[], TransferTicket], shipment: Shipment) -> None:
        super().__init__(call)
        self.shipment = shipment

    def gathered(self) -> bool:
        ticket: Any = self._ticket
        return ticket is not None and ticket.gathered()


class _Mark:
    """A place in a queue."""


Queue = SimpleQueue[Order[Any] | _Mark | None]

_END_SECONDS = 60.0
"""How long a process that ends waits for what has been asked to be dispatched."""

_LOOK_SECONDS = 0.1
"""How often whoever waits for a thread looks whether there still is one."""

_NO_MORE = _Mark()
"""In place of all further marks: whoever asks has given up."""


class Orders:
    """A thread, and the queue of what it is asked. It ends when nobody can ask it any longer, or
    with the process: XLA must not be called while that is taken down."""

    def __init__(self) -> None:
        self._queue: Queue = SimpleQueue()
        weakref.finalize(self, self._queue.put, None)
        _alive.add(self)
        self.thread = threading.Thread(
            target=_carry_out, args=(self._queue,), name="pdjax dispatch", daemon=True
        )
        self.thread.start()

    def give(self, order: Order[Any]) -> None:
        """To be carried out after all that were given before."""
        self._queue.put(order)

    def mark(self) -> _Mark:
        """The end of what has been given so far."""
        mark = _Mark()
        self._queue.put(mark)
        return mark

    def carry_out_until(self, marks: "SimpleQueue[_Mark]") -> None:
        """Within an order: carry out those that were given after it, up to the next of its marks,
        which may not have been made yet."""
        mark = marks.get()
        if mark is _NO_MORE:
            marks.put(mark)
        else:
            _carry_out(self._queue, mark)

    def rest(self) -> None:
        """Wait until all that was given has been carried out; of a thread that has ended it has
        been."""
        done = Order(_nothing)
        self.give(done)
        while self.thread.is_alive() and not done.wait(_LOOK_SECONDS):
            pass

    def end(self, seconds: float) -> None:
        """End the thread after what it was given; wait so long at most."""
        self._queue.put(None)
        self.thread.join(seconds)


_alive: "weakref.WeakSet[Orders]" = weakref.WeakSet()


@atexit.register  # after JAX did so, and so before it takes its clients down
def _end_all() -> None:
    # A thread that Python stops within XLA aborts the process. So who presses a key waits, too,
    # unless he has a handler of his own.
    waits = _alive and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if waits:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    for orders in list(_alive):
        orders.end(_END_SECONDS)
    if waits:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class _Nothing:
    """The ticket of no work."""

    def ready(self) -> bool:
        return True

    def result(self) -> None:
        return None


def _nothing() -> _Nothing:
    return _Nothing()


def _carry_out(queue: Queue, until: _Mark | None = None) -> None:
    """What is in a queue, up to a mark, or for good. It holds no order while it waits for the next,
    lest an engine outlive its last one."""
    while (order := queue.get()) is not until:
        if isinstance(order, Order):
            order.carry_out()
        del order


def on_threads(
    engines: Sequence[PrefillEngine], transfer: Transfer
) -> tuple[list["OrderedPrefillEngine"], "OrderedTransfer"]:
    """Each of the prefill engines with a thread of its own, and the transfer that goes with
    them."""
    orders = [Orders() for _ in engines]
    ends = {End(Side.PREFILL, i): each for i, each in enumerate(orders)}
    return list(map(OrderedPrefillEngine, engines, orders)), OrderedTransfer(transfer, ends)


class OrderedPrefillEngine:
    """A prefill engine, `inner`, that is asked by a thread; see `interfaces.PrefillEngine`."""

    def __init__(self, engine: PrefillEngine, orders: Orders) -> None:
        self.layout = engine.layout
        self.num_pages = engine.num_pages
        self.layer_groups = engine.layer_groups
        self.inner, self.orders = engine, orders

    @property
    def losses(self) -> int:
        return self.inner.losses

    def prefill(
        self, batch: PrefillBatch, after_group: Callable[[int], None] | None = None
    ) -> Order[Sampled]:
        marks: SimpleQueue[_Mark] = SimpleQueue()

        def sent(group: int) -> None:
            self.orders.carry_out_until(marks)

        order = Order(partial(self.inner.prefill, batch, sent))
        try:
            self.orders.give(order)
            for group in range(len(self.layer_groups)):
                if after_group is not None:
                    after_group(group)
                marks.put(self.orders.mark())
        finally:
            # Where somebody pressed a key the thread must not wait for marks that never come.
            marks.put(_NO_MORE)
        return order

    def rest(self) -> None:
        """Wait until all that was asked has been dispatched."""
        self.orders.rest()

    def close(self) -> None:
        self.rest()
        self.inner.close()

    def beside(self, engine: PrefillEngine) -> "OrderedPrefillEngine":
        """Another engine over the same pool, asked by the same thread."""
        return OrderedPrefillEngine(engine, self.orders)


class OrderedTransfer:
    """A transfer whose pools belong to threads; see `interfaces.Transfer`.

    Args:
      transfer: what moves the pages; `inner`.
      orders: of the ends that have a thread; of the others, calls are made at once.
    """

    def __init__(self, transfer: Transfer, orders: Mapping[End, Orders]) -> None:
        self.inner, self._orders = transfer, dict(orders)

    def beside(self, transfer: Transfer) -> "OrderedTransfer":
        """Another transfer between the same pools."""
        return OrderedTransfer(transfer, self._orders)

    def shares_pool(self, source: End, target: End) -> bool:
        return self.inner.shares_pool(source, target)

    def close(self) -> None:
        self.inner.close()

    def send(self, shipment: Shipment) -> TransferTicket:
        orders = self._orders.get(shipment.source)
        if orders is None:
            return self.inner.send(shipment)
        order = ShipmentOrder(partial(self.inner.send, shipment), shipment)
        orders.give(order)
        return order

    def land(self, ticket: TransferTicket, target_pages: Array) -> Ticket[int]:
        shipment = ticket.shipment
        sent: Any = ticket.ticket if isinstance(ticket, ShipmentOrder) else ticket
        orders = self._orders.get(shipment.target)
        if orders is None:
            return self.inner.land(sent, target_pages)
        order = Order(partial(self.inner.land, sent, target_pages))
        orders.give(order)
        return order

    def probe(self, source: End, target: End, nbytes: int) -> float:
        return self.inner.probe(source, target, nbytes)
