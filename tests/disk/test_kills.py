"""A process that writes is killed at any moment: what is found afterwards is right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.slots import __file__ as slots_file

ROOT = Path(slots_file).parents[2]

KILLS = """
import json, os, signal, sys, time
from pathlib import Path
import numpy as np
from pdjax.disk.headers import Identity, SlotContent
from tests.helpers.slots import found, key, new_store, payload, read

assert "jax" not in sys.modules
folder, rounds, direct = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
if not direct:
    os.O_DIRECT = 0
mine = Identity(bytes(16), bytes(16), 130_000)
rng = np.random.default_rng(0)


def serve(seed):
    # Writes batches over what is there, reads and drops, until it is killed.
    store, chances = new_store(folder, 70, mine, part_bytes=1 << 19), np.random.default_rng(seed)
    print("ready", file=told, flush=True)
    while True:
        slots = chances.choice(70, 12, replace=False)
        contents = [SlotContent(int(slot), key(chances.integers(1 << 40))) for slot in slots]
        pages = [payload(each.key, mine.payload_bytes) for each in contents]
        written = store.write(contents, pages)
        read(store, [each for each in contents[:2]])
        store.drop(slots[2:4].tolist())
        written.result()


kept = written = 0
for number in range(rounds):
    ends = os.pipe()
    child = os.fork()
    if not child:
        told = os.fdopen(ends[1], "w")
        try:
            serve(number)
        finally:
            os._exit(1)
    os.close(ends[1])
    assert os.read(ends[0], 5) == b"ready"
    time.sleep(rng.uniform(0, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(ends[0])
    store = new_store(folder, 70, mine)
    contents = store.file.contents()
    assert all(read(store, contents)), "a slot without its payload was found"
    assert not store.file.dropped, store.file.dropped
    kept, written = kept + len(contents), max(written, *store.file.headers.table["generation"])
    store.close()
print(json.dumps({"kept": int(kept), "written": int(written)}))
"""


@pytest.mark.parametrize("direct", [True, False])
def test_what_is_found_after_a_kill_is_right(tmp_path: Path, direct: bool):
    ran = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path), "8", str(direct)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert told["kept"] > 0 and told["written"] > 0
