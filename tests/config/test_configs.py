"""Every set-up in configs/ loads, and a small model of the same cut is served by its meshes."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

from pdjax import LLM, SamplingParams
from pdjax.config import ModelConfig
from pdjax.config.load import load_config
from pdjax.core.model_spec import ModelSpec
from tests.helpers.stand_in import few_programs

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
DEVICES = {
    "gpu_1p1d": 2,
    "gpu_colocated": 2,
    "gpu_tp_prefill_staged_decode": 4,
    "one_gpu": 1,
    "smollm2_cpu": 8,
}
SPEC = ModelSpec(101, 5, 24, 48, 6, 6, 4, 8192)
"""Every layout of these configs can cut it."""


def test_each_config_says_how_it_is_run():
    assert {path.stem for path in CONFIGS} == set(DEVICES)
    for path in CONFIGS:
        text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        assert re.search(rf"^Run: .*(configs/{path.name}|make demo)", text, re.MULTILINE), path.name
        assert "\nExpect:" in text, path.name
        assert load_config(path).devices == DEVICES[path.stem]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_layout_serves(path):
    config = load_config(path)
    small = replace(
        config,
        model=ModelConfig(source="random", spec=SPEC, max_model_len=128),
        prefill=replace(
            config.prefill, token_budget=64, token_buckets=None, page_buckets=None, pages=32
        ),
        decode=replace(config.decode, page_buckets=None, pages=32),
    )
    with LLM(few_programs(small)) as llm:
        [answer] = llm.generate([5, 6, 7], SamplingParams(temperature=0.0, max_tokens=2))
        moved = llm.recorder.transfers
    assert len(answer.token_ids) == 2
    assert (moved.transfers, moved.layout_changing_puts) == (0 if config.colocated else 1, 0)
