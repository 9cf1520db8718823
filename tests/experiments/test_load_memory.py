"""The models that the measurement of memory writes do load."""

from pathlib import Path

import pytest

from experiments.common.shapes import MODELS
from experiments.load_memory import __main__ as load_memory


@pytest.mark.parametrize("kind", load_memory.FORMATS)
def test_load_memory_writes_models_that_load(kind: str, tmp_path: Path):
    spec = MODELS["tiny"]
    found = load_memory.load(str(load_memory.write_model(kind, spec, tmp_path)), "float32")
    vocabulary = 2 * spec.vocab_size * spec.model_dim  # embedding and output, the largest two
    assert found["largest"] == 4 * vocabulary
    assert found["weights"] > found["largest"]
