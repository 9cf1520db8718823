"""Programs whose machine code is kept from one start of a process to the next.

JAX's compilation cache keeps what XLA makes of a program, by a digest of the program: to find it,
each start traces and lowers all of them once more. For a model of 32 layers with Pallas kernels
that takes most of a start. A builder of programs is given all that a program follows from, so the
machine code is kept by a digest of that instead (`key.py`), and a start that finds it neither
traces nor lowers nor compiles. Engines alike on other devices of the same kind find it, too.
"""

import logging
import pickle
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from weakref import WeakValueDictionary

from jax.sharding import Mesh

from pallas_kernels.implementations import noting_warnings, warn
from pdjax.device.compat import compiled, loaded, serialized
from pdjax.device.kept.key import Unkept, key_of
from pdjax.device.kept.store import Store
from pdjax.device.sharing import shapes_of

_LOG = logging.getLogger("pdjax")

_store: Store | None = None

_guard = threading.Lock()
_making: WeakValueDictionary[Any, Any] = WeakValueDictionary()
"""Locks of forms that are being made, by their names in the store where they have one: what is the
same for several engines is compiled by one thread, and read by the others. And of GPUs."""


def _lock_of(what: Any) -> threading.Lock:
    with _guard:
        lock: threading.Lock = _making.setdefault(what, threading.Lock())
        return lock


def keep_programs(store: Store | None) -> None:
    """Keep the programs of this process there from now on; None leaves them to JAX."""
    global _store
    _store = store


class KeptProgram:
    """A jitted function, of which each form that is compiled, one for each tree of shapes, is kept.

    Args:
      name: of what builds it.
      jitted: the function. `jax.jit` was given the shardings of all arguments.
      mesh: that it runs on.
      facts: what else it follows from besides the shapes of its arguments, see `key.described`.
      static: how many arguments are static; they come last.

    Attributes:
      jitted: as above; nothing that is called by it is kept.
      tried_on: the GPU on which XLA tries kernels while it compiles; None on other platforms.
      forms: compiled in this process, or read, by the shapes of their arguments.
    """

    def __init__(self, name: str, jitted: Any, mesh: Mesh, *facts: Any, static: int = 0) -> None:
        self._name, self.jitted, self._facts = name, jitted, (mesh, *facts)
        self._devices, self._static = tuple(mesh.devices.flat), static
        on_gpu = self._devices[0].platform == "gpu"
        self.tried_on: Any = self._devices[0] if on_gpu else None
        self.forms: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        return self.form(args)(*self.given(args))

    def over(self, same: int) -> "Over":
        """The program, for a caller whose first arguments, so many, have the same shapes in all of
        its calls: no call need look at every array of a model."""
        return Over(self, same)

    def given(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments that are not static."""
        return args[: len(args) - self._static]

    def shapes(self, args: tuple[Any, ...]) -> Any:
        """What arguments have in common with those of which the form is the same, hashable."""
        given = self.given(args)
        return shapes_of(*given), args[len(given) :]

    def form(self, args: tuple[Any, ...], name: str | None = None) -> Callable[..., Any]:
        """The form for arguments of these shapes: one of this process, one that is kept, or one
        that is compiled now, and kept. Any thread may ask; arguments may be shapes alone.

        Args:
          name: that `name_of` gave, if it has been asked.
        """
        shapes = self.shapes(args)
        form = self.forms.get(shapes)
        if form is None:
            key = name or self.name_of(shapes)
            with _lock_of(key or (self, shapes)):
                form = self.forms.get(shapes) or self._made(args, shapes, key)
        return form

    def _made(self, args: tuple[Any, ...], shapes: Any, key: str | None) -> Callable[..., Any]:
        form = self.forms[shapes] = self._kept(key) or self._compiled(args, key)
        return form

    def name_of(self, shapes: Any) -> str | None:
        """The name of a form in the store, the same for engines alike; None where it is not
        kept."""
        if _store is None:
            return None
        try:
            return key_of(self._name, self._facts, shapes, self._devices)
        except Unkept:
            return None

    def _kept(self, key: str | None) -> Callable[..., Any] | None:
        kept = _store.get(key) if _store is not None and key is not None else None
        if kept is None:
            return None
        try:
            warnings, program = pickle.loads(kept)
            form = loaded(program, self._devices)
            for each in warnings:
                warn(*each)
            return form
        except Exception as error:
            _LOG.warning("compilation_cache: program %s is compiled again: %s", self._name, error)
            return None

    def _compiled(self, args: tuple[Any, ...], key: str | None) -> Callable[..., Any]:
        with noting_warnings() as warnings:
            lowered = self.jitted.lower(*args)
        # XLA times kernels to choose among them, and warns of inaccurate times where several
        # programs are compiled for one GPU at once.
        alone = nullcontext() if self.tried_on is None else _lock_of(self.tried_on)
        with alone:
            program, is_whole = compiled(lowered)
        if _store is not None and key is not None and is_whole:
            kept = serialized(program, self._devices)
            if kept is not None:
                _store.put(key, pickle.dumps((warnings, kept)))
        return program


class Over:
    """A program as one caller sees it; see `KeptProgram.over`.

    Attributes:
      program: the program.
    """

    def __init__(self, program: KeptProgram, same: int) -> None:
        self.program, self._same = program, same
        self._forms: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        shapes = self.program.shapes(args[self._same :])
        form = self._forms.get(shapes)
        if form is None:
            form = self._forms[shapes] = self.program.form(args)
        return form(*self.program.given(args))
