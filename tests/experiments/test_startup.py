"""The start-up experiment: its child process, on a tiny model, and its watcher."""

import os
import sys

from experiments.common.origin import ROOT
from experiments.startup import __main__ as startup

TINY = """
from pdjax.config import Config, DecodeConfig, ModelConfig, PrefillConfig
from pdjax.core.model_spec import ModelSpec

def get_config():
    spec = ModelSpec(vocab_size=32, num_layers=1, model_dim=8, mlp_dim=8, query_heads=1,
                     kv_heads=1, head_dim=8, context=16)
    return Config(
        model=ModelConfig(source="random", spec=spec),
        prefill=PrefillConfig(token_budget=16, token_buckets=(16,), page_buckets=(16,)),
        decode=DecodeConfig(rows=1, page_buckets=(1,)),
        colocated=True,
        warm_up=False,
    )
"""


def test_a_start_is_measured_in_a_process_of_its_own(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)
    cache = tmp_path / "cache"
    found = startup.start(ROOT, cache, str(tmp_path / "tiny.py"), ["decode.lookahead=0"])
    assert list(found) == ["import", "first LLM", "first token", "close", "second LLM"]
    assert found["first LLM"]["weights"] > 0
    assert found["first token"]["compiling"] > 0
    assert "compiling" not in found["second LLM"]
    assert any(cache.iterdir())
    lines = startup.show({"new": found}).splitlines()
    assert sum("second LLM" in line for line in lines) == 1


def test_a_command_that_writes_as_it_goes_is_watched():
    program = "import time\nfor i in 1, 2: print(i, flush=True); time.sleep(0.2)"
    seen = startup.watch([sys.executable, "-c", program], os.environ)
    assert 0 < seen["longest gap"] < seen["end"]
