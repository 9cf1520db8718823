"""Compiles programs before anybody calls them.

A call of a program whose form is not compiled compiles it, in the thread that calls. A start would
so compile one after another. Here threads compile, as many at a time as there are cores: XLA lets
go of Python's lock while it compiles. Nothing of ours runs on a device, and no array is held: the
shapes say all. On a GPU one program is compiled at a time, since XLA times kernels there; the next
is lowered meanwhile. What engines alike share one of them compiles, and the others read it; until
then they compile what else there is.
"""

import contextlib
import os
import threading
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax

from pdjax.device.kept.program import KeptProgram
from pdjax.device.worker import DispatchFuture, Done, end_with_process

Call = tuple[KeptProgram, tuple[Any, ...]]
"""A program and its arguments, of which all but static ones are arrays, or `jax.ShapeDtypeStruct`s
in their place."""

_MOST_THREADS = 8
"""A compilation of a large model takes some GB of the host's memory."""

_MOST_ON_A_GPU = 2
"""Threads for programs of one GPU: one compiles, one lowers what comes next."""


class Dropped(RuntimeError):
    """A program was not compiled, since nobody needs it any more."""


class Ahead:
    """Threads that compile, for each set of devices in the order of the calls. They end when
    nothing is left.

    Args:
      threads: so many at the most; None takes the cores that the process may use.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._most = threads or min(_MOST_THREADS, _cores())
        self._lock = threading.Lock()
        self._asked: dict[Any, DispatchFuture[None]] = {}  # by form; those that have not ended
        self._queue: deque[Any] = deque()  # forms that no thread has taken
        self._names: dict[Any, str | None] = {}  # of forms asked for, in the store of programs
        self._making = set[str]()  # names of those that a thread has taken
        self._on = Counter[Any]()  # threads by GPU
        self._threads: list[threading.Thread] = []
        end_with_process(self)

    def compile(self, calls: Iterable[Call]) -> "Compiling":
        """Compile the forms of programs that calls of such arguments need. Returns at once; a form
        that is asked for again is compiled once."""
        asked = (self._ask(program, args) for program, args in calls)
        return Compiling([each for each in asked if each is not None])

    def _ask(self, program: KeptProgram, args: tuple[Any, ...]) -> DispatchFuture[None] | None:
        shapes = program.shapes(args)
        if shapes in program.forms:
            return None
        form, name = (program, shapes), program.name_of(shapes)
        with self._lock:
            future = self._asked.get(form)
            if future is None:
                shapes_alone = _shapes_alone(program, args)
                future = DispatchFuture(partial(_compile, program, shapes_alone, name))
                self._asked[form], self._names[form] = future, name
                self._queue.append(form)
                if len(self._threads) < self._most:
                    thread = threading.Thread(target=self._work, name="pdjax compile", daemon=True)
                    self._threads.append(thread)
                    thread.start()
        return future

    def _work(self) -> None:
        while (form := self._next()) is not None:
            with contextlib.suppress(BaseException):  # the future keeps it
                self._asked[form].make()
            with self._lock:
                del self._asked[form]
                self._on[form[0].tried_on] -= 1
                self._making.discard(self._names.pop(form) or "")

    def _next(self) -> Any:
        """The next form that may be compiled. Where there is none the thread that asks ends: those
        that hold others up go on with them."""
        with self._lock:
            for place, form in enumerate(self._queue):
                gpu, name = form[0].tried_on, self._names[form]
                if name not in self._making and (gpu is None or self._on[gpu] < _MOST_ON_A_GPU):
                    self._on[gpu] += 1
                    self._making |= set() if name is None else {name}
                    del self._queue[place]
                    return form
            self._threads.remove(threading.current_thread())
            return None

    def end(self, seconds: float | None = None) -> None:
        """Compile nothing more; wait for what is being compiled, which nothing can stop, so long at
        most."""
        with self._lock:
            dropped, threads = [self._asked.pop(form) for form in self._queue], [*self._threads]
            for form in self._queue:
                del self._names[form]
            self._queue.clear()
        for future in dropped:
            future.give_up(Dropped("the engine was closed before the program was compiled"))
        for thread in threads:
            thread.join(seconds)


class Compiling:
    """Programs that are being compiled; see `interfaces.Ticket`."""

    def __init__(self, programs: Sequence[DispatchFuture[None]]) -> None:
        self._programs = programs

    def ready(self) -> bool:
        return all(each.ready() for each in self._programs)

    def result(self) -> None:
        for each in self._programs:
            each.result()


def _cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _shapes_alone(program: KeptProgram, args: tuple[Any, ...]) -> tuple[Any, ...]:
    given = program.given(args)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), given)
    return *shapes, *args[len(given) :]


def _compile(program: KeptProgram, args: tuple[Any, ...], name: str | None) -> Done[None]:
    program.form(args, name)
    return Done(None)
