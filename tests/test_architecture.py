"""The rules of the packages, checked on the sources without running them.

A file's path decides what it may import: two columns (`pdjax/host`, `pdjax/device`), one door,
shared words, one roof. A rule takes a parsed Source and yields complaints; tests at the end run the
rules on sources that break them. A new file directly under `pdjax/` is in "words", the strictest
room, until ROOMS says otherwise.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pdjax", "pallas_kernels")
FOLDERS = (*PACKAGES, "experiments", "configs", "tests")
MAX_LINES = 400

PUBLIC = ("LLM", "AsyncLLM", "SLO", "Config", "SamplingParams", "RequestOutput", "load_config")
# By the first name below `pdjax`. What `pdjax` itself binds, lazily, may load anything.
ROOMS = {
    **dict.fromkeys(["", *PUBLIC], "public names"),
    **dict.fromkeys(["cli", "bench", "explain", "serving", "__main__"], "front"),
    **dict.fromkeys(["pictures", "report"], "front"),
    **{room: room for room in ("host", "sim", "device", "disk")},
    "interfaces": "door",
    **dict.fromkeys(["core", "config", "formats", "text"], "words"),
    **dict.fromkeys(["session", "book", "entry", "listeners"], "session"),
    **dict.fromkeys(["stream", "coordinator_thread"], "session"),
    **dict.fromkeys(["request_maker", "async_stream", "guide_queue"], "session"),
    "deploy": "roof",
    **dict.fromkeys(["llm", "async_llm", "convert"], "surface"),
}
BELOW = {"words", "door"}
MAY_IMPORT = {
    "words": {"words"},
    "door": BELOW,
    "host": {*BELOW, "host"},
    "sim": {*BELOW, "host", "sim"},
    "disk": {*BELOW, "disk"},
    "device": {*BELOW, "device", "disk", "pallas_kernels"},
    "session": {*BELOW, "host", "session"},
    "roof": {*BELOW, "host", "sim", "device", "disk", "session", "roof"},
    "surface": {*BELOW, "host", "device", "session", "roof", "surface"},
    "public names": {*BELOW, "roof", "surface"},
    "front": {*ROOMS.values()},
    "pallas_kernels": {"pallas_kernels"},
    "configs": {"words"},
    "experiments": {*ROOMS.values(), *BELOW, "pallas_kernels", "experiments"},
    "tests": {*ROOMS.values(), *BELOW, *FOLDERS},
}
WITHOUT_JAX = {"words", "door", "host", "session", "sim", "disk", "configs"}
JAX = ("jax", "jaxlib", "flax", "optax", "orbax")

# Floors of a column, by the name below it; what is not named stands on floor 1.
FLOORS: dict[str, dict[str, int]] = {
    "host": {
        "coordinator*": 7,
        **dict.fromkeys(["loop*", "warm_up*", "audit*"], 6),
        **dict.fromkeys(["runners*", "shedding*", "planning*", "admissions*", "roles*"], 5),
        **dict.fromkeys(["handoff.accounting*", "handoff.spans*"], 1),
        **dict.fromkeys(["handoff*", "losses*", "health*", "pinning*", "tiers*"], 4),
        **dict.fromkeys(["sequences.lifecycle*", "sequences.output*", "fleet*", "engines*"], 3),
        **dict.fromkeys(["policies*", "sequences.ranking*"], 2),
    },
    "device": {
        "builder*": 5,
        **dict.fromkeys(["engine*", "needs*"], 4),
        "programs*": 3,
        "steps*": 2,
        **dict.fromkeys(["mesh*", "compat*", "worker*"], 0),
    },
}

COMPAT_FILE = "pdjax/device/compat.py"
CLOCK_FILE = "pdjax/core/clock.py"
MESH_FILE = "pdjax/device/mesh.py"
MESH_MAKERS = {"Mesh", "make_mesh", "create_device_mesh", "create_hybrid_device_mesh"}
PUTS = {"device_put", "device_put_sharded", "device_put_replicated"}
PUT_FILES = (
    "pdjax/device/programs/decode.py",
    "pdjax/device/kv/tiers.py",
    "pdjax/device/kv/trans*.py",
    "pdjax/device/checkpoints/*.py",
    "pdjax/device/models/weights.py",
)


def is_below(name: str, *roots: str) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def room_of(dotted: str) -> str | None:
    """Return the room of a dotted name, or None for a name outside this repository."""
    first, _, rest = dotted.partition(".")
    if first == "pdjax":
        return ROOMS.get(rest.partition(".")[0], "words")
    return first if first in FOLDERS else None


def nodes_of(tree: ast.AST) -> list[ast.AST]:
    """All nodes, outer ones first, in half the time that `ast.walk` takes."""
    found = [tree]
    for node in found:  # which grows
        for value in vars(node).values():
            several = value if isinstance(value, list) else (value,)
            found += [each for each in several if isinstance(each, ast.AST)]
    return found


class Source:
    """One parsed file: its names with aliases resolved, each as (dotted name, line)."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        nodes = nodes_of(ast.parse(text, path))
        self.lines = len(text.splitlines())
        self.module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        room = room_of(self.module)
        assert room is not None, path
        self.room = room
        self.origins: dict[str, str] = {}
        self.imports = list(self._imports(nodes))
        attributes = [node for node in nodes if isinstance(node, ast.Attribute | ast.Name)]
        self.references = [(self._dotted(node), node.lineno) for node in attributes]
        calls = [node for node in nodes if isinstance(node, ast.Call)]
        self.calls = [(self._dotted(node.func), node.lineno) for node in calls]

    def _imports(self, nodes: list[ast.AST]) -> Iterator[tuple[str, int]]:
        """Yield imports at any depth: `from a import b` names `a.b`."""
        package = (
            self.module if self.path.endswith("__init__.py") else self.module.rpartition(".")[0]
        )
        for node in nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.asname:
                        self.origins[alias.asname] = alias.name
                    yield alias.name, node.lineno
            elif isinstance(node, ast.ImportFrom):
                parents = (
                    package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
                )
                base = ".".join([*parents, *filter(None, [node.module])])
                for alias in node.names:
                    self.origins[alias.asname or alias.name] = f"{base}.{alias.name}"
                    yield f"{base}.{alias.name}", node.lineno

    def _dotted(self, node: ast.expr) -> str:
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        parts.append(self.origins.get(node.id, node.id) if isinstance(node, ast.Name) else "?")
        return ".".join(reversed(parts))


def check_rooms(source: Source) -> Iterator[str]:
    """A file imports only from the rooms that its own room may import."""
    columns = set()
    for name, line in source.imports:
        target = room_of(name)
        columns |= {target} & {"host", "device"}
        if source.room in WITHOUT_JAX and is_below(name, *JAX):
            yield f"{source.path}:{line}: {source.room} must not import {name}"
        if target is not None and target not in MAY_IMPORT[source.room]:
            yield f"{source.path}:{line}: {source.room} must not import {name}, of {target}"
        if source.room == "configs" and not is_below(name, "pdjax.config"):
            yield f"{source.path}:{line}: a config imports only pdjax.config, not {name}"
    if len(columns) == 2 and source.room not in ("roof", "tests"):
        yield f"{source.path}: only pdjax/deploy.py imports both columns"


def floor_of(column: str, dotted: str) -> int:
    below = dotted.removeprefix(f"pdjax.{column}.")
    return next((floor for glob, floor in FLOORS[column].items() if fnmatch(below, glob)), 1)


def check_floors(source: Source) -> Iterator[str]:
    """Inside a column a file imports only from its own floor or lower ones."""
    if source.room not in FLOORS:
        return
    for name, line in source.imports:
        above = floor_of(source.room, name) > floor_of(source.room, source.module)
        if room_of(name) == source.room and above:
            yield f"{source.path}:{line}: {name} stands above this file"


def check_private(source: Source) -> Iterator[str]:
    """Only compat.py imports jax._src."""
    if source.path != COMPAT_FILE:
        for name, line in {*source.imports, *source.references}:
            if is_below(name, "jax._src"):
                yield f"{source.path}:{line}: jax._src is imported only in {COMPAT_FILE}"


def check_clock(source: Source) -> Iterator[str]:
    """Wall time is injected: only the clock's file reads it or sleeps."""
    if source.path.startswith(PACKAGES) and source.path != CLOCK_FILE:
        for name, line in source.imports:
            if is_below(name, "time"):
                yield f"{source.path}:{line}: wall time is read only in {CLOCK_FILE}"
        for name, line in source.calls:
            if re.search(r"\b(datetime|date)\.(now|utcnow|today)$", name):
                yield f"{source.path}:{line}: wall time is read only in {CLOCK_FILE}"


def check_meshes(source: Source) -> Iterator[str]:
    """Only one file makes meshes; an AbstractMesh has no devices and may be made anywhere."""
    if source.path.startswith(PACKAGES) and source.path != MESH_FILE:
        for name, line in source.calls:
            if name.rpartition(".")[2] in MESH_MAKERS and not is_below(name, "pdjax.device.mesh"):
                yield f"{source.path}:{line}: meshes are made only in {MESH_FILE}"


def check_puts(source: Source) -> Iterator[str]:
    """Only a few files move bytes between devices, and each counts them."""
    allowed = any(fnmatch(source.path, glob) for glob in PUT_FILES)
    if source.path.startswith(PACKAGES) and not allowed:
        for name, line in {*source.imports, *source.references}:
            if name.rpartition(".")[2] in PUTS:
                yield f"{source.path}:{line}: device_put appears only in {', '.join(PUT_FILES)}"


def check_length(source: Source) -> Iterator[str]:
    """A file has at most MAX_LINES lines, so that it can be read at one sitting."""
    if source.lines > MAX_LINES:
        yield f"{source.path}: {source.lines} lines; at most {MAX_LINES}"


RULES = (
    *(check_rooms, check_floors, check_private, check_clock, check_meshes, check_puts),
    check_length,
)


def complaints(source: Source) -> list[str]:
    return sorted({complaint for rule in RULES for complaint in rule(source)})


@cache
def sources() -> dict[str, Source]:
    """Read every Python file of the repository, by its path from the root."""
    files = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
    paths = [file.relative_to(ROOT).as_posix() for file in files]
    return {path: Source(path, (ROOT / path).read_text("utf-8")) for path in paths}


def cycles(edges: dict[str, set[str]]) -> list[str]:
    """List the modules that reach themselves through imports."""
    reach = {module: set(targets) for module, targets in edges.items()}
    for middle in edges:
        for module in edges:
            if middle in reach[module]:
                reach[module] |= reach[middle]
    return sorted(module for module in edges if module in reach[module])


def import_graph(files: list[Source]) -> dict[str, set[str]]:
    """Map each module to the modules it imports; `a.b.C` imports `a.b` where that is a file."""
    modules = {source.module for source in files}
    graph = {}
    for source in files:
        names = {name for name, _ in source.imports}
        parents = {name.rpartition(".")[0] for name in names - modules}
        graph[source.module] = (names | parents) & modules
    return graph


@pytest.mark.smoke
def test_every_file_keeps_the_rules():
    found = [complaint for source in sources().values() for complaint in complaints(source)]
    assert not found, "\n" + "\n".join(found)


def test_imports_form_no_cycle():
    files = [source for source in sources().values() if source.path.startswith(PACKAGES)]
    assert cycles(import_graph(files)) == []


@pytest.mark.smoke
def test_host_column_runs_without_jax():
    rooms = WITHOUT_JAX - {"configs"}
    modules = [source.module for source in sources().values() if source.room in rooms]
    script = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print(*({set(JAX)!r} & set(sys.modules)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == []


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("pdjax/host/kv/pages.py", "import jax.numpy as jnp", "host must not import jax.numpy"),
        ("pdjax/host/kv/pages.py", "def f():\n    from flax import struct", "py:2: host must not"),
        ("pdjax/host/batching/prefill_batch.py", "from pdjax.device import mesh", "of device"),
        (
            "pdjax/host/policies/decode.py",
            "from ...device.kv import pool",
            "import pdjax.device.kv.pool",
        ),
        ("pdjax/host/batching/prefill_batch.py", "from pdjax import LLM", "of public names"),
        ("pdjax/host/kv/pages.py", "from pdjax.host.policies import api", "stands above"),
        ("pdjax/device/engine.py", "import pdjax.host.kv.pages", "of host"),
        ("pdjax/device/models/llama.py", "from ..steps import decode", "stands above"),
        ("pdjax/device/mesh.py", "from pdjax.device.kv.pool import KVPool", "stands above"),
        ("pdjax/disk/slot_file.py", "import jax", "disk must not import jax"),
        ("pdjax/disk/slot_file.py", "from pdjax.host.kv import pages", "of host"),
        ("pdjax/host/kv/pages.py", "import pdjax.disk.slot_file", "of disk"),
        ("pdjax/core/request.py", "import jax", "words must not import jax"),
        ("pdjax/core/request.py", "from pdjax.interfaces.engine import Ticket", "of door"),
        ("pdjax/a_new_file.py", "import orbax.checkpoint", "words must not import orbax"),
        ("pdjax/sim/cluster.py", "from pdjax.device.engine import Engine", "of device"),
        (
            "pdjax/serving/http.py",
            "from pdjax.host import metrics\nimport pdjax.device.mesh",
            "both",
        ),
        ("experiments/x.py", "import pdjax.host.kv.pages, pdjax.device.mesh", "both columns"),
        ("pdjax/llm.py", "import experiments.quickstart", "of experiments"),
        ("pdjax/llm.py", "from pdjax.host import kv\nfrom pdjax.device import mesh", "both"),
        ("pdjax/cli/generate.py", "from tests import helpers", "of tests"),
        ("pallas_kernels/copy/api.py", "from pdjax.core.kv_layout import KVLayout", "of words"),
        ("configs/tiny.py", "import os", "only pdjax.config"),
        ("configs/tiny.py", "from pdjax.core.request import Request", "only pdjax.config"),
        ("pdjax/device/mesh.py", "from jax._src import mesh", "jax._src"),
        ("tests/unit/test_x.py", "import jax\njax._src.config.update", "test_x.py:2: jax._src"),
        ("pdjax/host/coordinator.py", "import time", "wall time"),
        ("pdjax/device/engine.py", "from time import perf_counter as now", "wall time"),
        ("pdjax/device/engine.py", "from datetime import datetime\ndatetime.now()", "wall time"),
        (
            "pdjax/device/engine.py",
            "from jax.sharding import Mesh as M\nM(d, a)",
            "meshes are made",
        ),
        ("pallas_kernels/copy/api.py", "import jax\njax.make_mesh((1,), 'x')", "meshes are made"),
        ("pdjax/device/steps/decode.py", "import jax\nput = jax.device_put", "device_put appears"),
        ("pdjax/device/kv/pool.py", "from jax import device_put as put", "device_put appears"),
        ("pdjax/host/kv/pages.py", "\n" * (MAX_LINES + 1), "401 lines"),
    ],
)
def test_a_broken_rule_is_caught(path: str, text: str, expected: str):
    found = complaints(Source(path, text))
    assert any(expected in complaint for complaint in found), found


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "pdjax/deploy.py",
            "import jax\nfrom pdjax.host import pages\nfrom pdjax.device import engine",
        ),
        (
            "pdjax/host/coordinator.py",
            "import numpy\nfrom . import pages\nfrom .policies import prefill",
        ),
        (
            "pdjax/device/programs/decode.py",
            "import jax\nfrom pdjax.device.steps import decode\njax.device_put",
        ),
        ("pdjax/device/engine.py", "from pdjax.device.mesh import make_mesh\nmake_mesh(1)"),
        ("pdjax/device/steps/decode.py", "from jax.sharding import Mesh\ndef f(mesh: Mesh): ..."),
        ("pdjax/device/compat.py", "from jax._src import config"),
        ("pdjax/device/kv/transfer_plan.py", "from jax import device_put"),
        ("pdjax/core/clock.py", "import time\ntime.sleep(0)"),
        (
            "experiments/bench.py",
            "import time\nfrom pdjax import LLM\nfrom pdjax.host import metrics",
        ),
        ("configs/tiny.py", "from pdjax.config import Config"),
        ("pdjax/host/kv/pages.py", "\n" * MAX_LINES),
    ],
)
def test_a_kept_rule_is_not_complained_of(path: str, text: str):
    assert complaints(Source(path, text)) == []


def test_a_cycle_is_found():
    texts = {
        "pdjax/host/a.py": "from pdjax.host.b import B",
        "pdjax/host/b.py": "from . import c",
        "pdjax/host/c.py": "def f():\n    import pdjax.host.a",
        "pdjax/host/d.py": "from pdjax.host import a",
    }
    graph = import_graph([Source(path, text) for path, text in texts.items()])
    assert cycles(graph) == ["pdjax.host.a", "pdjax.host.b", "pdjax.host.c"]
