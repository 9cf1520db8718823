"""The owner of a pool, when threads look at it at once."""

import threading
from typing import Any

import jax
import pytest

from pdjax.core.kv_layout import KVLayout
from pdjax.device.compat import is_sound
from pdjax.device.kv.pool import PoolOwner
from pdjax.device.mesh import PREFILL_RULES, make_mesh

pytestmark = pytest.mark.smoke


@pytest.fixture
def pool() -> PoolOwner:
    layout = KVLayout.of_heads(1, 1, 4, 2, "float32", 4)
    return PoolOwner(layout, 3, make_mesh(jax.devices()[:1], 1, 1), PREFILL_RULES)


def lose(pool: PoolOwner) -> None:
    for array in jax.tree.leaves(pool.arrays):
        array.delete()


def look_elsewhere(pool: PoolOwner) -> None:
    looker = threading.Thread(target=pool.inspect)
    looker.start()
    looker.join()


def test_a_loss_that_another_thread_sees_in_the_middle_of_a_step_is_mended_after_it(
    pool: PoolOwner,
):
    with pool.donated():
        lose(pool)
        look_elsewhere(pool)
        assert pool.losses == 0
    assert pool.losses == 1 and is_sound(pool.arrays)


class LateLooker:
    """A lock; just before it is released another thread looks at the pool, and finds it taken."""

    def __init__(self, pool: PoolOwner) -> None:
        self._pool, self._lock = pool, threading.RLock()
        self.acquire, self.release = self._lock.acquire, self._lock.release

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        lose(self._pool)
        look_elsewhere(self._pool)
        self._lock.release()


def test_a_loss_that_is_seen_while_the_step_lets_go_of_the_pool_is_mended(pool: PoolOwner):
    lock: Any = LateLooker(pool)
    pool._lock = lock
    with pool.donated():
        pass
    assert pool.losses == 1 and is_sound(pool.arrays)
