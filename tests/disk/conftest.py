"""Stores of slot files that are closed when a test ends."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from pdjax.disk.slot_store import SlotStore
from tests.helpers.slots import new_store


@pytest.fixture
def open_store() -> Iterator[Callable[..., SlotStore]]:
    """Opens stores; see `new_store`."""
    with ExitStack() as stack:

        def opened(*args, **kwargs) -> SlotStore:
            store = new_store(*args, **kwargs)
            stack.callback(store.close)
            return store

        yield opened
