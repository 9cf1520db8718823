"""JAX calls that differ between versions, are private, or are untyped: no other file makes them."""

import contextlib
import io
import os
import pickle
import threading
from collections.abc import Callable
from typing import Any

import jax
import jaxlib.version
import numpy as np
from jax._src import compiler
from jax._src.lib import xla_client  # type: ignore[attr-defined]
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache


def use_virtual_cpu_devices(count: int) -> None:
    """Ask for `count` CPU devices, if JAX has not started and may run on the CPU.

    A backend that has started keeps its number of devices; `mesh.share_out` raises if they are
    too few.
    """
    platforms = jax.config.jax_platforms  # None: JAX takes an accelerator, if any, and the CPU
    if jax.config.jax_num_cpu_devices >= count or not (
        platforms is None or "cpu" in platforms.split(",")
    ):
        return
    with contextlib.suppress(RuntimeError):  # the backend is up already
        jax.config.update("jax_num_cpu_devices", count)


def has_compilation_cache() -> bool:
    """Whether somebody has told JAX where to keep compiled programs, or not to."""
    return jax.config.jax_compilation_cache_dir is not None or (
        not jax.config.jax_enable_compilation_cache
    )


def keep_compilations(directory: str, most_bytes: int | None = None) -> None:
    """Cache every program compiled from now on in `directory`, and load programs cached there.

    JAX's lower bounds on size and compile time are off. On GPUs JAX lets XLA keep its autotuning
    results there, too (`jax_persistent_cache_enable_xla_caches`, on by default).

    Args:
      directory: is made if it does not exist.
      most_bytes: bound of its size; None leaves JAX's setting, which is no bound by default.
    """
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if most_bytes is not None and jax.config.jax_compilation_cache_max_size == -1:
        jax.config.update("jax_compilation_cache_max_size", most_bytes)
    # JAX reads the setting once, when it first compiles; the reset makes it read again.
    compilation_cache.reset_cache()


def keep_no_compilations() -> None:
    """Neither cache programs compiled from now on, nor load cached ones."""
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def compilation_cache_dir() -> str | None:
    """Where JAX keeps compiled programs, if it does."""
    return jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None


_NOT_OF_PROGRAMS = (
    "jax_compilation_cache",
    "jax_persistent_cache",
    "jax_log",
    "jax_explain",
    "jax_transfer_guard",
)


def jax_settings() -> list[tuple[str, str]]:
    """JAX's settings, but those of caches, logs and guards of transfers, as they are in this
    thread."""
    return [
        (name, repr(getattr(jax.config, name, None)))
        for name in sorted(jax.config.values)
        if not name.startswith(_NOT_OF_PROGRAMS)
    ]


def settings_of_this_thread() -> list[str]:
    """As `name=value`, those of `jax_settings` that hold in this thread alone, as within `with
    jax.default_matmul_precision(...)`."""
    elsewhere: dict[str, str] = {}
    thread = threading.Thread(target=lambda: elsewhere.update(jax_settings()))
    thread.start()
    thread.join()
    return [f"{name}={value}" for name, value in jax_settings() if elsewhere[name] != value]


def topology_of(devices: tuple[jax.Device, ...]) -> tuple[str, ...]:
    """What devices are, with their instruction sets, and the versions of what compiles for them.

    Raises:
      JaxRuntimeError: their platform has no such description.
    """
    versions = jax.__version__, jaxlib.version.__version__, devices[0].client.platform_version
    topology = xla_client.get_topology_for_devices(list(devices))
    return (*versions, *(device.device_kind for device in devices), str(topology.fingerprint()))


_ASKED, _FOUND = (
    f"/jax/compilation_cache/{event}" for event in ("compile_requests_use_cache", "cache_hits")
)
_heard = threading.local()


def _listen(event: str, **_: str | int) -> None:
    events: set[str] | None = getattr(_heard, "events", None)
    if events is not None:
        events.add(event)


jax.monitoring.register_event_listener(_listen)


_CPU_OPTIONS = {
    "xla_backend_optimization_level": 1,
    "xla_cpu_parallel_codegen_split_count": 1,
}
"""Options of XLA on the CPU, where compilations are most of a start: it takes a tenth less, and a
step 1 to 3% more. Programs are compiled side by side already, so each is one piece."""


def _options() -> dict[str, bool | str]:
    """Those of a compilation on this platform. What XLA_FLAGS say goes before."""
    if jax.default_backend() != "cpu":
        return {}
    said = os.environ.get("XLA_FLAGS", "")
    return {name: str(value) for name, value in _CPU_OPTIONS.items() if name not in said}


def compiled(program: jax.stages.Lowered) -> tuple[jax.stages.Compiled, bool]:
    """Compile a program; also whether `serialized` may be asked for it. On the CPU it may not if
    JAX has read it from its cache: serialised once more, it has lost its functions (JAX 0.11.2)."""
    _heard.events = set()
    made = program.compile(compiler_options=_options())
    cached = compilation_cache_dir() is not None and (
        _ASKED not in _heard.events or _FOUND in _heard.events
    )
    return made, not cached or jax.default_backend() != "cpu"


def are_alike(devices: tuple[jax.Device, ...]) -> bool:
    """Whether a program that is compiled for these devices runs on as many others of their kind: a
    TPU's depends on where the devices are."""
    return devices[0].platform in ("cpu", "gpu")


def serialized(program: jax.stages.Compiled, devices: tuple[jax.Device, ...]) -> bytes | None:
    """A program that is compiled for these devices as bytes, for `loaded`; None where it can't be
    one."""
    try:
        ids = [device.id for device in devices]
        return pickle.dumps((ids, *serialize_executable.serialize(program)))
    except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError):
        return None


def loaded(program: bytes, devices: tuple[jax.Device, ...]) -> Callable[..., Any]:
    """A compiled program of `serialized`, on the devices that it was compiled for, or on others if
    they are alike, in the same order. Bytes that come from elsewhere must not be loaded: they may
    do anything."""
    if devices[0].platform == "gpu":
        from jax.experimental.mosaic import gpu  # noqa: F401  # what its kernels call
    ids, executable, args, results = pickle.loads(program)
    unloaded, infos, no_kwargs = _Unpickler(executable, ids, devices).load()
    infos = args.unflatten(infos)
    return jax.stages.Compiled(unloaded.load(), [], infos, results, no_kwargs=no_kwargs)


class _Unpickler(serialize_executable._JaxPjrtUnpickler):
    """Reads a serialised program as `serialize_executable.deserialize_and_load` does, for other
    devices than those with the ids that it was compiled for."""

    def __init__(self, program: bytes, ids: list[int], devices: tuple[jax.Device, ...]) -> None:
        super().__init__(io.BytesIO(program), devices[0].client, devices)
        self.devices_by_id = dict(zip(ids, devices, strict=True))

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] != "exec":
            return super().persistent_load(pid)
        ids = np.array([[device.id for device in self.devices_by_id.values()]])
        options = compiler.get_compile_options(
            num_replicas=1, num_partitions=ids.size, device_assignment=ids
        )
        return self.backend.deserialize_executable(pid[1], self.execution_devices, options)


def all_ready(arrays: Any) -> bool:
    """Whether every array of the tree can be read without a wait. (`is_ready` is public, but
    untyped.)"""
    return all(leaf.is_ready() for leaf in jax.tree.leaves(arrays))


def is_sound(arrays: Any) -> bool:
    """Wait for every array of the tree; return whether all can be read.

    An array that is deleted, or the result of a failed computation, cannot be read. (`is_deleted`
    is public, but untyped.)
    """
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(arrays)):
        return False
    try:
        jax.block_until_ready(arrays)
    except Exception:
        return False
    return True
