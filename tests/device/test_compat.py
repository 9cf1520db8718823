import subprocess
import sys
from pathlib import Path

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
