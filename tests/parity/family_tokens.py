"""Greedy answers of tiny models of every family: the prompts, and what transformers answers."""

import json
from pathlib import Path

import numpy as np

FIXTURE = Path(__file__).parent / "fixtures" / "family_tokens.json"
NEW_TOKENS = 24
MODELS = (
    "mistral_window",
    "qwen3",
    "olmo2",
    "granite",
    "smollm3",
    "phi3_longrope",
    "glm",
    "glm4",
    "gemma2",
    "gemma3",
    "mixtral",
    "qwen3_moe",
)
"""Of `tiny_models`, one for each family or feature."""


def prompts() -> list[list[int]]:
    """Return four prompts of 18 to 21 token ids that begin alike: longer than the windows, than a
    chunk of 16, and than the context that LongRoPE was trained with."""
    rng = np.random.default_rng(5)
    shared = rng.integers(3, 101, 13).tolist()
    return [shared + rng.integers(3, 101, length).tolist() for length in (5, 6, 7, 8)]


def answers(name: str) -> list[list[int]]:
    """Return what transformers answers to the prompts, greedily."""
    return json.loads(FIXTURE.read_text())["answers"][name]
