"""Kept programs: what a second start finds, what it does not take for it, what it survives."""

import logging
import os
from dataclasses import dataclass, replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from pallas_kernels import implementations
from pallas_kernels.implementations import Operation
from pdjax import LLM, SamplingParams
from pdjax.device.compat import keep_compilations, keep_no_compilations
from pdjax.device.compilation_cache import use_compilation_cache
from pdjax.device.kept import key as keys
from pdjax.device.kept import program as kept
from pdjax.device.kept.program import KeptProgram, keep_programs
from pdjax.device.kept.store import Store
from pdjax.device.mesh import make_mesh, shardings
from pdjax.device.models.llama import Llama
from pdjax.device.sharing import Specs, forget
from tests.helpers.promise import COLD, SPEC, disaggregated


@pytest.fixture
def store(tmp_path):
    """A store of this test's own, without JAX's cache; what the tests share is put back."""
    before, folder = kept._store, jax.config.jax_compilation_cache_dir
    ours = Store(tmp_path / "programs", None)
    keep_no_compilations()
    keep_programs(ours)
    yield ours
    keep_programs(before)
    keep_compilations(folder)


def mesh_of(count=1, first=0):
    return make_mesh(jax.devices()[first : first + count], 1, count)


def doubling(mesh, *facts, name="double"):
    """A program that notes how often it is traced."""
    traced = []

    def double(x):
        traced.append(x.shape)
        return x * 2

    where = shardings(mesh, P())
    return KeptProgram(name, jax.jit(double, in_shardings=where), mesh, *facts), traced


def test_a_program_is_traced_once_however_often_it_is_built(store):
    first, traced = doubling(mesh_of(), "facts")
    assert first(np.array([1, 2], np.float32)).tolist() == [2, 4]
    assert first(np.array([3, 4], np.float32)).tolist() == [6, 8]
    assert traced == [(2,)]
    second, traced = doubling(mesh_of(), "facts")
    assert second(np.array([5, 6], np.float32)).tolist() == [10, 12]
    assert traced == []
    assert len(list(store.folder.iterdir())) == len(second.forms) == 1


@pytest.mark.parametrize(
    "other",
    [
        lambda: doubling(mesh_of(), "other facts"),
        lambda: doubling(mesh_of(), "facts", name="triple"),
        lambda: doubling(mesh_of(2), "facts"),
    ],
)
def test_another_program_is_not_taken_for_it(store, other):
    doubling(mesh_of(), "facts")[0](np.array([1, 2], np.float32))
    program, traced = other()
    assert program(np.array([1, 2], np.float32)).tolist() == [2, 4]
    assert traced == [(2,)]


@pytest.mark.parametrize(("count", "first"), [(1, 3), (2, 4)])
def test_devices_alike_share_a_program(store, count, first):
    def summed(mesh, calls):
        def sum_up(x):
            calls.append(x)
            return lax.psum(x * (1 + lax.axis_index("tp")), "tp")

        mapped = jax.shard_map(sum_up, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
        return KeptProgram("sum", jax.jit(mapped, in_shardings=shardings(mesh, P())), mesh)

    x, traced = np.array([1, 2], np.float32), list[object]()
    here, there = mesh_of(count), make_mesh(jax.devices()[first : first + count][::-1], 1, count)
    for mesh in (here, there, here):
        came = summed(mesh, traced)(x)
        assert came.tolist() == (x * sum(range(1, count + 1))).tolist()
        assert came.sharding.mesh == mesh
    assert len(traced) == 1


def test_devices_that_differ_by_their_place_do_not_share_one(monkeypatch):
    def told():
        return [keys.described(mesh_of(first=first)) for first in (0, 1)]

    assert len({*map(str, told())}) == 1
    monkeypatch.setattr(keys, "are_alike", lambda devices: False)
    assert len({*map(str, told())}) == 2


@pytest.mark.parametrize(
    "args", [np.array([1], np.float32), np.array([1, 2], np.int32), np.zeros((1, 2), np.float32)]
)
def test_other_shapes_and_types_are_other_forms(store, args):
    doubling(mesh_of(), "facts")[0](np.array([1, 2], np.float32))
    program, traced = doubling(mesh_of(), "facts")
    assert program(args).tolist() == (args * 2).tolist()
    assert traced == [args.shape]


def test_settings_and_code_are_part_of_the_key(store, monkeypatch):
    def key():
        return keys.key_of("name", [], None, tuple(jax.devices()[:1]))

    before = key()
    assert key() == before
    with jax.default_matmul_precision("float32"):
        assert key() != before
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_cpu_enable_fast_math=false")
    assert key() != before
    monkeypatch.undo()
    assert key() == before
    monkeypatch.setattr(keys, "_digest", lambda: "edited")
    assert key() != before


def test_facts_are_told_by_their_values():
    class Ours(Llama):
        pass

    Ours.__module__ = "pdjax.device.models.ours"
    told = [
        keys.described(fact)
        for fact in (
            SPEC,
            replace(SPEC, norm_eps=1e-4),
            Llama(),
            Ours(),
            Specs.of({"x": jax.device_put(jnp.ones(2), shardings(mesh_of(), P()))}),
            [np.dtype("float32"), jnp.dtype("bfloat16")],
            {"a": (None, True, 1, 1.0, "1")},
        )
    ]
    assert len(set(map(str, told))) == len(told)
    assert not any(" at 0x" in str(each) for each in told)
    assert keys.described(SPEC) == keys.described(replace(SPEC))


def test_what_follows_from_the_users_code_is_not_kept(store):
    @dataclass(frozen=True)
    class Family:
        name: str

    program, traced = doubling(mesh_of(), Family("mine"))
    assert (
        program(np.array([1, 2], np.float32)).tolist()
        == program(np.array([1, 2], np.float32)).tolist()
        == [2, 4]
    )
    assert traced == [(2,)]
    assert not store.folder.exists()


def test_what_may_follow_from_other_code_than_is_on_disk_is_not_kept(store, monkeypatch, tmp_path):
    source = tmp_path / "step.py"
    source.write_text("x = 1")
    monkeypatch.setattr(keys, "_sources", lambda: [("step.py", source)])
    monkeypatch.setattr(keys, "_IMPORTED", keys._stamps())
    x = np.array([1, 2], np.float32)
    doubling(mesh_of(), "facts")[0](x)
    for edit in (lambda: source.write_text("x = 2.0"), source.unlink):
        edit()
        program, traced = doubling(mesh_of(), "facts")
        assert program(x).tolist() == [2, 4]
        assert traced == [(2,)]
    assert len(list(store.folder.iterdir())) == 1


def test_devices_without_a_description_and_programs_without_bytes_are_served(store, monkeypatch):
    def refuse(*args):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED")

    x = np.array([1, 2], np.float32)
    for name in (f"{keys.__name__}.topology_of", "jax.experimental.serialize_executable.serialize"):
        with monkeypatch.context() as patch:
            patch.setattr(name, refuse)
            assert doubling(mesh_of(), "facts")[0](x).tolist() == [2, 4]
    assert not store.folder.exists()


def test_what_tracing_warns_of_is_warned_of_at_each_start(store, monkeypatch, caplog):
    why_not = SimpleNamespace(refusal=lambda x: "too small", double=lambda x: x * 2)
    monkeypatch.setattr(Operation, "module", lambda self, name: why_not)
    monkeypatch.setattr(implementations, "_foreign", lambda name: False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    operation = Operation("double", "", ("reference", "gpu"), {"cuda": "gpu"}, warns=True)
    where = shardings(mesh_of(), P())
    x = np.array([1, 2], np.float32)
    for _ in range(2):
        implementations.warn.cache_clear()
        caplog.clear()
        jitted = jax.jit(lambda x: operation.run(None, (x,), {}, shown=(x,)), in_shardings=where)
        with caplog.at_level(logging.WARNING, "pallas_kernels"):
            assert KeptProgram("double", jitted, mesh_of())(x).tolist() == [2, 4]
        assert caplog.messages == [
            "double: no kernel runs on this GPU, only the slow reference: too small"
        ]
    assert len(list(store.folder.iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"no program", b"\x80\x04N."])
def test_what_is_no_program_is_compiled_again(store, caplog, content):
    doubling(mesh_of(), "facts")[0](np.array([1, 2], np.float32))
    [file] = store.folder.iterdir()
    whole = file.stat().st_size
    store.put(file.name, content)
    program, traced = doubling(mesh_of(), "facts")
    with caplog.at_level(logging.WARNING, "pdjax"):
        assert program(np.array([1, 2], np.float32)).tolist() == [2, 4]
    assert traced == [(2,)]
    assert "compilation_cache: program double is compiled again" in caplog.text
    assert file.stat().st_size == pytest.approx(whole, rel=0.1)


def test_a_file_of_which_a_part_is_lost_is_compiled_again(store):
    x = np.array([1, 2], np.float32)
    doubling(mesh_of(), "facts")[0](x)
    [file] = store.folder.iterdir()
    whole = file.read_bytes()
    for broken in (b"", whole[:-1], whole[:-100] + bytes(50) + whole[-50:]):
        file.write_bytes(broken)
        program, traced = doubling(mesh_of(), "facts")
        assert program(x).tolist() == [2, 4]
        assert traced == [(2,)]
        assert store.get(file.name) is not None


@pytest.mark.parametrize(
    ("mode", "user", "reason"),
    [
        (0o700, 0, None),
        (0o755, 0, None),
        (0o775, 0, "may be written by others: chmod go-w it, or remove it"),
        (0o757, 0, "may be written by others"),
        (0o700, 1, "belongs to another user"),
    ],
)
def test_a_folder_that_others_can_write_is_not_read(
    tmp_path, monkeypatch, caplog, mode: int, user: int, reason: str | None
):
    monkeypatch.delenv("PDJAX_KEEP_PROGRAMS", raising=False)
    folder, kept_before = tmp_path / "pdjax", kept._store
    jax_before = jax.config.jax_compilation_cache_dir
    folder.mkdir()
    folder.chmod(mode)
    if user:
        owner = folder.stat().st_uid
        monkeypatch.setattr(os, "getuid", lambda: 4242)
        if owner == 0:
            os.chown(folder, 4343, -1)
    with caplog.at_level(logging.WARNING, "pdjax"):
        use_compilation_cache(str(tmp_path))
    assert (kept._store is None) == (reason is not None)
    assert (reason or "") in caplog.text
    keep_programs(kept_before)
    keep_compilations(jax_before)


def test_a_folder_is_made_for_its_user_alone(tmp_path):
    store = Store(tmp_path / "pdjax", None)
    assert store.distrusted() is None
    store.put("name", b"kept")
    assert store.folder.stat().st_mode & 0o777 == 0o700
    assert store.get("name") == b"kept"


def test_what_jax_reads_from_its_own_cache_is_not_kept_on_the_cpu(store, tmp_path):
    keep_compilations(str(tmp_path / "jax"))
    x = np.array([1, 2], np.float32)
    doubling(mesh_of(), "facts")[0](x)
    [file] = store.folder.iterdir()
    file.unlink()
    jax.clear_caches()
    for _ in range(2):
        program, traced = doubling(mesh_of(), "facts")
        assert program(x).tolist() == [2, 4]
        assert traced == [(2,)]
    assert not list(store.folder.iterdir())


def test_static_arguments_and_one_callers_view(store):
    mesh = mesh_of()
    where = shardings(mesh, (P(), P()))

    def scaled(x, y, by):
        return x + y * by

    jitted = jax.jit(scaled, static_argnums=2, in_shardings=where)
    program = KeptProgram("scaled", jitted, mesh, static=1)
    view = program.over(1)
    x = np.array([1], np.float32)
    assert [float(view(x, x, by)[0]) for by in (1, 2, 1)] == [2, 3, 2]
    assert [float(view(x, np.array([y, y], np.float32), 2)[0]) for y in (1, 2)] == [3, 5]
    assert len(program.forms) == 3


def test_a_second_start_compiles_no_step(store, monkeypatch):
    config = disaggregated(1, 1, 1, groups=1)
    # An LLM asks for the cache that JAX is set to; here it keeps its programs in the fixture's.
    monkeypatch.setattr("pdjax.device.devices.use_compilation_cache", lambda asked: None)

    def answer():
        forget()
        with LLM(config, COLD) as llm:
            [output] = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=6))
            return output.choices[0].token_ids

    first = answer()
    assert len(list(store.folder.iterdir())) > 3

    def refuse(self, *args):
        raise AssertionError(f"{self._name} was compiled again")

    monkeypatch.setattr(KeptProgram, "_compiled", refuse)
    assert answer() == first
    forget()


def test_the_store_drops_what_was_used_least_recently(tmp_path):
    store = Store(tmp_path / "programs", 250)
    for age, name in enumerate(["a", "b", "c"]):
        store.put(name, bytes(80))
        if (tmp_path / "programs" / name).exists():
            os.utime(tmp_path / "programs" / name, (age, age))
    assert sorted(path.name for path in store.folder.iterdir()) == ["b", "c"]
    assert store.get("b") == bytes(80)
    store.put("d", bytes(80))
    assert sorted(path.name for path in store.folder.iterdir()) == ["b", "d"]
    assert store.get("c") is None


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path):
    (tmp_path / "file").write_text("no folder")
    store = Store(tmp_path / "file" / "programs", None)
    store.put("a", b"bytes")
    assert store.get("a") is None
