"""Programs that are compiled before they are called: by several threads, once each, with nothing
run; and the threads end."""

import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pdjax.device.compat import compiled, keep_compilations, keep_no_compilations
from pdjax.device.kept import program as kept
from pdjax.device.kept.ahead import Ahead, Dropped
from pdjax.device.kept.program import KeptProgram, keep_programs
from pdjax.device.kept.store import Store
from pdjax.device.mesh import make_mesh, shardings

SECONDS = 60


@pytest.fixture(autouse=True)
def nothing_kept():
    """What one test compiles is not there in the next."""
    before = kept._store
    keep_programs(None)
    yield
    keep_programs(before)


class Traced:
    """What notes that it is traced, and may wait then."""

    def __init__(self, name="traced", device=0, error=None, wait=None):
        self.times, self.began, self._wait, self._error = 0, threading.Event(), wait, error
        mesh = make_mesh(jax.devices()[device : device + 1], 1, 1)
        jitted = jax.jit(self._double, donate_argnums=0, in_shardings=shardings(mesh, P()))
        self.program = KeptProgram(name, jitted, mesh, name)

    def _double(self, x):
        self.times += 1
        self.began.set()
        if self._wait is not None:
            self._wait()
        if self._error is not None:
            raise self._error
        return x * 2

    def call(self, size=2):
        """With an argument that is no array."""
        return self.program, (jax.ShapeDtypeStruct((size,), jnp.float32),)


def threads():
    return [each for each in threading.enumerate() if each.name == "pdjax compile"]


def rest():
    for each in threads():
        each.join(SECONDS)
    assert not threads()


def test_nothing_runs_and_a_call_finds_what_it_needs():
    traced, x = Traced(), jnp.array([1, 2], jnp.float32)
    compiling = Ahead().compile([(traced.program, (x,)), traced.call(3), traced.call(2)])
    compiling.result()
    assert compiling.ready() and traced.times == 2 == len(traced.program.forms)
    assert x.tolist() == [1, 2]  # was not donated
    assert traced.program(x).tolist() == [2, 4] and traced.times == 2
    assert Ahead().compile([traced.call()]).ready()
    rest()


def test_several_compile_at_once_and_a_form_that_is_asked_for_again_is_one():
    met, ahead = threading.Barrier(2), Ahead(2)
    pair = [Traced(wait=lambda: met.wait(SECONDS)) for _ in range(2)]
    both = [ahead.compile([each.call()]) for each in (*pair, *pair)]
    for each in both:
        each.result()
    assert [each.times for each in pair] == [1, 1]


def test_they_are_compiled_in_the_order_of_the_calls():
    go, ahead, seen = threading.Event(), Ahead(1), list[int]()
    first = Traced(wait=lambda: go.wait(SECONDS))
    rest_of_them = [Traced(wait=lambda number=number: seen.append(number)) for number in range(4)]
    compiling = ahead.compile(each.call() for each in (first, *rest_of_them))
    assert not compiling.ready()
    go.set()
    compiling.result()
    assert seen == [0, 1, 2, 3]
    rest()


@pytest.fixture
def programs_kept(tmp_path):
    """Kept in a folder of this test's own, and not by JAX."""
    folder = jax.config.jax_compilation_cache_dir
    keep_no_compilations()
    keep_programs(Store(tmp_path, None))
    yield
    keep_compilations(folder)


@pytest.mark.usefixtures("programs_kept")
def test_what_engines_alike_share_is_compiled_once():
    alike = [Traced("alike", device) for device in (0, 1, 2)]
    Ahead(3).compile(each.call() for each in alike).result()
    assert sum(each.times for each in alike) == 1
    for each in alike:
        assert each.program(np.array([1, 2], np.float32)).tolist() == [2, 4]
    assert not kept._making


@pytest.mark.usefixtures("programs_kept")
def test_engines_alike_compile_different_programs_meanwhile():
    go, ahead = threading.Event(), Ahead(2)
    first = Traced("one", 0, wait=lambda: go.wait(SECONDS)), Traced("two", 0)
    second = Traced("one", 1), Traced("two", 1)
    for gpu, engine in (("gpu 0", first), ("gpu 1", second)):
        for each in engine:
            each.program.tried_on = gpu
    compiling = ahead.compile(each.call() for each in (first[0], *second, first[1]))
    assert second[1].began.wait(SECONDS)  # while the first engine is at the program before it
    go.set()
    compiling.result()
    assert [each.times for each in (*first, *second)] == [1, 0, 0, 1]
    rest()
    assert not (ahead._names or ahead._making)


def test_an_error_is_the_tickets_and_others_go_on():
    ahead = Ahead(1)
    bad = ahead.compile([Traced(error=TypeError("bad")).call()])
    good = ahead.compile([Traced().call()])
    good.result()
    with pytest.raises(TypeError, match="bad"):
        bad.result()
    rest()


def test_an_end_drops_what_nobody_has_begun_and_waits_for_the_rest():
    go, ahead = threading.Event(), Ahead(1)
    slow, later = Traced(wait=lambda: go.wait(SECONDS)), Traced()
    begun, dropped = ahead.compile([slow.call()]), ahead.compile([later.call()])
    assert slow.began.wait(SECONDS)
    threading.Timer(0.05, go.set).start()
    ahead.end()
    assert not threads()
    begun.result()
    with pytest.raises(Dropped):
        dropped.result()
    assert later.times == 0 and not ahead._asked


def test_of_one_gpu_a_program_is_compiled_at_a_time_while_the_next_is_lowered(monkeypatch):
    traced = {gpu: [Traced() for _ in range(3)] for gpu in ("gpu 0", "gpu 1")}
    for gpu, some in traced.items():
        for each in some:
            each.program.tried_on = gpu
    here, compiling, seen = threading.local(), list[str](), set[str]()
    both, made, compile_it = threading.Barrier(2), KeptProgram._made, compiled

    def noted(program, *given):
        here.gpu = program.tried_on
        return made(program, *given)

    def compile_alone(lowered):
        assert here.gpu not in compiling
        compiling.append(here.gpu)
        if here.gpu not in seen:
            seen.add(here.gpu)
            both.wait(SECONDS)  # for the other GPU's first
            assert traced[here.gpu][1].began.wait(SECONDS)
        compiling.remove(here.gpu)
        return compile_it(lowered)

    monkeypatch.setattr(KeptProgram, "_made", noted)
    monkeypatch.setattr(kept, "compiled", compile_alone)
    Ahead(8).compile(each.call() for some in traced.values() for each in some).result()
    assert all(each.times == 1 for some in traced.values() for each in some)
    rest()


LEAVES = """
import threading
from tests.device.test_ahead import Ahead, Traced
traced = [Traced() for _ in range(200)]
Ahead(2).compile(each.call() for each in traced)
assert traced[0].began.wait(60)
"""


def test_a_process_may_end_while_its_threads_compile():
    subprocess.run([sys.executable, "-c", LEAVES], check=True, timeout=300)
