"""Guides for the random model of the end-to-end tests, and its answers by a loop over the logits of
whole texts."""

import functools
from typing import Any

import jax
import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from pdjax.core.guide import Guide
from pdjax.core.request import SamplingParams
from pdjax.device.mesh import PREFILL_RULES, make_mesh
from pdjax.device.models.weights import random_params
from pdjax.llm import LLM
from pdjax.request_maker import guide_maker, text_maker
from pdjax.text.guides import GuideCompiler
from pdjax.text.tokenizer import Tokenizer
from tests.helpers.dense import dense_logits
from tests.helpers.promise import MONOLITHIC, SPEC

SCHEMA = Guide.json_schema(
    {
        "type": "object",
        "properties": {
            "a": {"enum": ["x", "yy", True]},
            "b": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["a", "b"],
        "additionalProperties": False,
    }
)


def tokenizer() -> Tokenizer:
    """A vocabulary of the random model's size: its end token, the visible characters of ASCII, a
    blank, and some texts of several characters."""
    texts = [chr(code) for code in range(33, 127)] + ["Ġ", '{"', '":', "12", "tr", "yes"]
    [end] = SPEC.eos_token_ids
    ids = [token for token in range(SPEC.vocab_size) if token != end]
    backend = Backend(models.BPE(dict(zip(texts, ids, strict=True)) | {"<end>": end}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    return Tokenizer(backend, eos_token_ids=(end,))


@functools.cache
def compiler() -> GuideCompiler:
    """Of guides over that vocabulary."""
    return GuideCompiler(tokenizer(), SPEC.vocab_size)


def give_text(llm: LLM) -> None:
    """Let a random model have that vocabulary."""
    llm.requests.tokenizer, llm.requests._guides = tokenizer(), compiler()
    llm.coordinator._make_text = text_maker(tokenizer())
    llm.coordinator._make_guide = guide_maker(compiler())


def greedy(prompt: list[int], params: SamplingParams) -> list[int]:
    """The answer by whole logits of the whole text at each token."""
    assert params.guide is not None and params.temperature == 0
    guide, tokens = compiler().start(params.guide), list(prompt)
    [end] = SPEC.eos_token_ids
    while len(tokens) - len(prompt) < (params.max_tokens or SPEC.context):
        padded = np.zeros(SPEC.context, np.int32)
        padded[: len(tokens)] = tokens
        logits = np.asarray(dense_logits(_params(), padded, spec=SPEC))[len(tokens) - 1]
        allowed = np.unpackbits(guide.mask().view(np.uint8), bitorder="little")[: SPEC.vocab_size]
        allowed[end] = guide.accepts
        tokens.append(int(np.argmax(np.where(allowed, logits, -np.inf))))
        if tokens[-1] == end:
            break
        guide.push(tokens[-1])
        if guide.complete:
            break
    return tokens[len(prompt) :]


@functools.cache
def _params() -> Any:
    mesh, layers = make_mesh(jax.devices()[:1], 1, 1), (tuple(range(SPEC.num_layers)),)
    return random_params(SPEC, mesh, PREFILL_RULES, layers, "float32", MONOLITHIC.seed)
