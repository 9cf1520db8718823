"""The default model compared with transformers on the same file: text to ids, ids to ids."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from pdjax.core.kv_layout import split_layers
from pdjax.device.checkpoints.api import Checkpoint
from pdjax.device.checkpoints.catalog import DEFAULT_MODEL
from pdjax.device.checkpoints.open import open_checkpoint
from pdjax.device.mesh import PREFILL_RULES, make_mesh
from pdjax.device.models.weights import load_params
from pdjax.text.tokenizer import Tokenizer
from tests.helpers.dense import dense_logits

pytestmark = pytest.mark.model

LENGTH = 128
"""Length to which all sequences are padded, so that the model is compiled once."""


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "fixtures" / "smollm2.json").read_text())


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    found = checkpoint.tokenizer()
    assert found is not None
    return found


def test_token_ids_of_tricky_strings(tokenizer: Tokenizer, expected: dict[str, Any]):
    for text, ids in expected["strings"]:
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_token_ids_of_conversations(tokenizer: Tokenizer, expected: dict[str, Any]):
    for messages, ids in expected["chats"]:
        assert tokenizer.apply_chat_template(messages) == ids


def test_greedy_tokens(checkpoint: Checkpoint, expected: dict[str, Any]):
    """Each token of the continuation is the argmax after the tokens before it, as in a greedy loop.
    One pass over the whole sequence checks all.
    """
    spec = checkpoint.spec
    mesh = make_mesh(jax.devices()[:1], stages=1, tp=1)
    params = load_params(
        checkpoint, mesh, PREFILL_RULES, split_layers(spec.num_layers, 1), "float32"
    )
    for prompt, continuation in expected["greedy"]:
        sequence = np.zeros(LENGTH, np.int32)
        sequence[: len(prompt) + len(continuation)] = prompt + continuation
        logits = dense_logits(params, sequence, spec=spec)
        chosen = np.argmax(logits[len(prompt) - 1 :], axis=-1)
        assert chosen[: len(continuation)].tolist() == continuation
