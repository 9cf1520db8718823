"""Test that a family of models is a file: layers of two kinds and a weight of its own, see
`tests/helpers/two_kinds.py`, are served, loaded and converted like any other model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from pdjax.config import ModelConfig
from pdjax.core.kv_layout import split_layers
from pdjax.core.model_spec import ModelSpec
from pdjax.core.request import SamplingParams
from pdjax.device.checkpoints.api import num_params, tensor_shapes
from pdjax.device.checkpoints.open import open_checkpoint
from pdjax.device.checkpoints.orbax import convert
from pdjax.device.mesh import PREFILL_RULES, make_mesh
from pdjax.device.models.registry import family_of, kv_layout, matrix_params, slot_kinds
from pdjax.device.models.weights import load_params, random_params
from pdjax.llm import LLM
from tests.helpers.dense import dense_logits
from tests.helpers.promise import COLD, MONOLITHIC, SPEC, conserved, disaggregated
from tests.helpers.two_kinds import TwoKindsSpec

TWO_KINDS = TwoKindsSpec(**vars(replace(SPEC, num_layers=4, family="two_kinds")))
PROMPTS = [np.random.default_rng(n).integers(0, 101, n).tolist() for n in (1, 5, 17, 33)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def tokens(config: Any) -> list[list[int]]:
    config = replace(config, model=ModelConfig(source="random", spec=TWO_KINDS), cpu_devices=8)
    with LLM(config, COLD) as llm:
        answers = [answer.token_ids for answer in llm.generate(PROMPTS, GREEDY)]
        conserved(llm)
    return answers


def test_layers_of_two_kinds_are_served_in_every_layout():
    """Monolithic tokens are those of attention at its plainest; disaggregated ones equal them."""
    monolithic = tokens(MONOLITHIC)
    mesh = make_mesh(jax.devices()[:1], 1, 1)
    params = random_params(TWO_KINDS, mesh, PREFILL_RULES, split_layers(4, 1), "float32")
    for prompt, answer in zip(PROMPTS, monolithic, strict=True):
        every: Any = np.zeros(48, np.int32)  # of one length, so that they share a compilation
        last = len(prompt) + len(answer) - 1
        every[: last + 1] = [*prompt, *answer]
        logits = dense_logits(params, every, spec=TWO_KINDS)
        assert np.argmax(logits, axis=1)[len(prompt) - 1 : last].tolist() == answer
    assert tokens(disaggregated(2, 2, 1, groups=2)) == monolithic


def test_what_a_window_hides_changes_nothing():
    mesh = make_mesh(jax.devices()[:1], 1, 1)
    spec = replace(TWO_KINDS, num_layers=1)
    params = random_params(spec, mesh, PREFILL_RULES, split_layers(1, 1), "float32")
    long = np.array(PROMPTS[2], np.int32)
    whole = np.asarray(dense_logits(params, long, spec=spec))
    seen = np.asarray(dense_logits(params, long[-spec.local_window :], spec=spec))
    np.testing.assert_allclose(whole[-1], seen[-1], rtol=1e-3, atol=1e-4)


def test_stages_whose_layers_are_of_different_kinds_are_refused():
    family = family_of(TWO_KINDS)
    assert slot_kinds(TWO_KINDS, [[0, 1], [2, 3]]) == list(family.kinds(TWO_KINDS))[:2]
    with pytest.raises(ValueError, match=r"stages=4: puts layers .*; allowed: \[1, 2\]"):
        kv_layout(TWO_KINDS, 4, "float32", stages=4)
    with pytest.raises(ValueError, match=r"decode\.stages=4: puts layers"):
        tokens(disaggregated(1, 4, 1))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A Hugging Face directory of the made-up family, whose window is 5."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = {"model_type": "two_kinds", "num_hidden_layers": 3, "window": 5, "eos_token_id": 2}
    config["qk_norm"] = True  # which other families refuse
    rng = np.random.default_rng(0)
    spec = ModelSpec(101, 3, 32, 96, 4, 2, 8, 64, family="two_kinds")
    shapes = tensor_shapes(TwoKindsSpec(**vars(spec)))
    found = {name: rng.normal(1, 0.2, each).astype(np.float32) for name, each in shapes.items()}
    directory = tmp_path / "two_kinds"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config | sizes))
    save_file(found, directory / "model.safetensors")
    return directory


def test_a_new_weight_is_loaded_counted_and_converted(directory: Path, tmp_path: Path):
    checkpoint = open_checkpoint(directory)
    spec = checkpoint.spec
    assert isinstance(spec, TwoKindsSpec) and (spec.local_window, spec.family) == (5, "two_kinds")
    mesh = make_mesh(jax.devices()[:2], 1, 2)
    layout = kv_layout(spec, 4, "float32", tp=2)
    params = load_params(checkpoint, mesh, PREFILL_RULES, layout.stage_layers, "float32")
    stored = checkpoint.read("model.layers.1.self_attn.k_norm.weight")
    np.testing.assert_array_equal(params.layers[1]["k_norm"], stored)
    plain = replace(spec, family="llama")
    assert num_params(spec) - num_params(plain) == 3 * 2 * spec.head_dim
    assert matrix_params(spec) == matrix_params(plain)
    convert(checkpoint, tmp_path / "converted", "float32")
    again = open_checkpoint(tmp_path / "converted")
    assert again.spec == spec
    np.testing.assert_array_equal(again.read("model.layers.1.self_attn.k_norm.weight"), stored)


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="family='gpt': allowed are llama, mistral, qwen2"):
        family_of(replace(SPEC, family="gpt"))
