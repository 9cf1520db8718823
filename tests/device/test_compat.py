import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from pdjax.config import NO_CACHE
from pdjax.device import compat
from pdjax.device.builder import build_engines
from pdjax.device.compilation_cache import use_compilation_cache
from pdjax.device.mesh import make_mesh
from pdjax.device.steps.sample import make_sample_step
from tests.helpers.promise import MONOLITHIC, SPEC

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys, jax
from pdjax.device.compat import keep_compilations
jax.config.update("jax_platforms", "cpu")
jax.jit(lambda x: x + 1)(0)  # JAX has already looked whether there is a cache
keep_compilations(sys.argv[1])
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
jax.jit(lambda x: x * 2)(0)
print(hits.count("/jax/compilation_cache/cache_hits"))
"""


def test_compilations_are_kept_for_the_next_process(tmp_path):
    """Of a program too small and quick for JAX's own defaults, in a process that has compiled."""
    found = []
    for _ in range(2):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "new" / "cache")]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        found.append(ran.stdout.split())
    assert found == [["0"], ["1"]]


@pytest.fixture
def settings():
    """JAX's settings of its cache; put back afterwards."""
    names = [
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
        "jax_compilation_cache_max_size",
    ]
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.usefixtures("settings")
def test_programs_are_kept_in_the_users_cache_unless_jax_is_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.delenv("PDJAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    set_by_the_tests = jax.config.jax_compilation_cache_dir
    use_compilation_cache(None)
    assert jax.config.jax_compilation_cache_dir == set_by_the_tests
    use_compilation_cache(NO_CACHE)
    assert jax.config.jax_compilation_cache_dir is None
    use_compilation_cache(None)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "pdjax" / "jax")
    assert jax.config.jax_compilation_cache_max_size == 8 << 30
    assert (tmp_path / "pdjax" / "jax").is_dir()


@pytest.mark.usefixtures("settings")
def test_a_cache_that_cannot_be_written_only_warns(tmp_path, caplog):
    before = jax.config.jax_compilation_cache_dir
    (tmp_path / "file").write_text("no folder")
    use_compilation_cache(str(tmp_path / "file" / "cache"))
    assert jax.config.jax_compilation_cache_dir == before
    assert "compilation_cache: programs are not kept for the next start" in caplog.text


def test_flags_of_the_environment_go_before_options_of_our_own(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    options = compat._options()
    assert set(options) == set(compat._CPU_OPTIONS)
    assert jax.jit(lambda x: x + 1).lower(1).compile(compiler_options=options)(1) == 2
    monkeypatch.setenv("XLA_FLAGS", " ".join(f"--{name}=2" for name in options))
    assert compat._options() == {}


def test_engines_refuse_a_setting_that_their_threads_would_not_see():
    with (
        jax.default_matmul_precision("float32"),
        pytest.raises(ValueError, match="jax_default_matmul_precision='float32': holds in this th"),
    ):
        build_engines(MONOLITHIC, SPEC, 64, None)
    with jax.transfer_guard("log"), jax.log_compiles():  # no program follows from these
        assert compat.settings_of_this_thread() == []


def test_a_changed_setting_builds_programs_anew():
    mesh = make_mesh(jax.devices()[:1], 1, 1)
    before = make_sample_step(mesh, 3)
    assert make_sample_step(mesh, 3) is before
    jax.config.update("jax_default_matmul_precision", "float32")
    try:
        assert make_sample_step(mesh, 3) is not before
    finally:
        jax.config.update("jax_default_matmul_precision", None)
    assert make_sample_step(mesh, 3) is before
