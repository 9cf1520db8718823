"""A conversation that goes on after a restart finds its KV on the disk."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from pdjax.config import TiersConfig
from pdjax.core.request import SamplingParams
from pdjax.disk.slot_file import FILE_NAME
from pdjax.disk.slot_store import SlotStore
from pdjax.llm import LLM
from tests.e2e.test_tiers import PAGE, TIERED
from tests.helpers.promise import COLD, SPEC, conserved

PROMPT = np.random.default_rng(7).integers(0, SPEC.vocab_size, 40).tolist()
FILLERS = np.random.default_rng(8).integers(0, SPEC.vocab_size, (4, 62)).tolist()
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


def ask(llm: LLM, prompt: list[int] = PROMPT) -> tuple[list[int], int]:
    """The answer, and the prompt tokens that were found."""
    [output] = llm.generate([prompt], GREEDY)
    conserved(llm)
    return output.token_ids, output.metrics.cached_tokens


def test_a_restart_serves_hits_from_the_disk_and_never_what_is_corrupt(tmp_path: Path):
    # Host memory has room for two prompts: what comes after them drives the first to the disk.
    tiers = TiersConfig(host_gb=6e-5, disk_folder=str(tmp_path), disk_gb=1e-3)
    config = replace(TIERED, tiers=tiers)
    whole = (len(PROMPT) - 1) // PAGE * PAGE
    with LLM(config, COLD) as llm:
        expected, found = ask(llm)
        assert not found, "all of it was computed"
        for filler in FILLERS:
            ask(llm, filler)
        assert ask(llm) == (expected, whole)
    with LLM(config, COLD) as llm:
        assert ask(llm) == (expected, whole)
        counters = store_of(llm).counters()
        assert counters.read == whole // PAGE and not counters.corrupt and not counters.dropped
        for filler in FILLERS:
            ask(llm, filler)
    corrupt(tmp_path / FILE_NAME)
    with LLM(config, COLD) as llm:
        answer, found = ask(llm)
        assert answer == expected and found < whole
        counters = store_of(llm).counters()
        assert counters.corrupt or counters.dropped["damaged"]
        answer, found = ask(llm)
        assert answer == expected and found >= whole


def store_of(llm: LLM) -> SlotStore:
    store = llm.deployment.disk
    assert store is not None
    return store


def corrupt(path: Path) -> None:
    """Flip a bit in every fourth block, at random places."""
    rng, bits = np.random.default_rng(9), bytearray(path.read_bytes())
    for block in range(1, len(bits) // 4096, 4):
        bits[4096 * block + int(rng.integers(4096))] ^= 1 << int(rng.integers(8))
    path.write_bytes(bits)
