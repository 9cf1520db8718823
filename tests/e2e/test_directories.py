"""A Hugging Face directory that lacks what serving token ids does not need."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pdjax import LLM, SamplingParams
from pdjax.config import ModelConfig
from tests.helpers import tiny_models
from tests.helpers.promise import MONOLITHIC

FIXTURE = Path(__file__).parents[1] / "parity" / "fixtures" / "tiny_logits.npz"


def test_token_ids_without_a_tokenizer(tmp_path: Path):
    """The greedy token is that of transformers; text is refused with the directory's name."""
    directory = tiny_models.write("llama", tmp_path)
    prompt = tiny_models.tokens("llama")
    with np.load(FIXTURE) as file:
        likeliest = int(np.argmax(file["llama"][-1]))
    config = replace(MONOLITHIC, model=ModelConfig(source=str(directory)), warm_up=False)
    with LLM(config) as llm:
        assert llm.tokenizer is None
        answer = llm.generate(prompt.tolist(), SamplingParams(temperature=0.0, max_tokens=1))[0]
        assert answer.token_ids == [likeliest]
        assert answer.text == ""
        message = rf"prompt: model\.source='{directory}' has no tokenizer; give token ids"
        with pytest.raises(ValueError, match=message):
            llm.generate("a text")
