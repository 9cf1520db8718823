"""Make the fixtures of the parity tests with Hugging Face transformers.

Made with Python 3.11, torch 2.13.0, transformers 5.23.0 (those of families: 5.24.0), gguf 0.19.0,
tokenizers 0.23.3 (the versions are also written into `fixtures/smollm2.json`). In an environment
with these and this project's own dependencies, run from the repository root:

    python -m tests.parity.make_fixtures

It writes `fixtures/tiny_logits.npz` (logits of the models in `tiny_models.py`),
`fixtures/family_tokens.json` (greedy continuations of some of them) and `fixtures/smollm2.json`
(token ids and greedy continuations of the default model).
"""

import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from pdjax.device.checkpoints.catalog import DEFAULT_MODEL, fetch
from tests.helpers import tiny_models
from tests.parity import family_tokens

FIXTURES = Path(__file__).parent / "fixtures"
NEW_TOKENS = 24

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at 100 degrees Celsius, which is",
]
CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": "Is 7 a prime number?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And 9?"},
    ],
]
STRINGS = [
    "",
    " ",
    "Hello, world!",
    "  two leading spaces",
    "trailing spaces   ",
    "tabs\tand\nnewlines\r\n\n\n  mixed  \n",
    "1234567890 12 345,678.90 3.14e-10",
    "   7  8   9",
    "don't can't I'll we've they'RE",
    "café naïve Ünïcödé Straße",
    "日本語のテキスト 中文 한국어",
    "emoji: 😀 👨‍👩‍👧‍👦 🇫🇷 é",
    "non-breaking\u00a0space and zero\u200bwidth",
    "x²+y³=½ ١٢٣ Ⅷ",
    "<|im_start|>user\nhi<|im_end|>",
    "<|endoftext|><|im_end|> <|im_start|>",
    "not special: <|im_sta rt|> <im_end>",
    "\x00\x01 control",
    "CamelCase snake_case kebab-case https://example.com/a?b=c&d=%20",
    "    def f(x):\n        return x ** 2  # comment\n",
]


def tiny_logits() -> dict[str, np.ndarray]:
    """Compute the logits f32[T, V] of every tiny model."""
    logits = {}
    for name in tiny_models.TINY_MODELS:
        with tempfile.TemporaryDirectory() as scratch:
            directory = tiny_models.write(name, Path(scratch))
            model = AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, attn_implementation="eager"
            )
            ids = torch.tensor(tiny_models.tokens(name)[None].astype(np.int64))
            with torch.inference_mode():
                logits[name] = model(ids).logits[0].numpy()
    return logits


def greedy_tokens(name: str) -> list[list[int]]:
    """Continue the prompts of `family_tokens` with a tiny model.

    Each token is the first choice of a whole pass over the tokens before it, so that LongRoPE
    rotates all of them in one way, and by a clear margin: another order of summation gives it, too.
    """
    with tempfile.TemporaryDirectory() as scratch:
        directory = tiny_models.write(name, Path(scratch))
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )
        answers = []
        for prompt in family_tokens.prompts():
            ids = list(prompt)
            for _ in range(family_tokens.NEW_TOKENS):
                with torch.inference_mode():
                    best = model(torch.tensor([ids])).logits[0, -1].topk(2)
                assert best.values[0] - best.values[1] > 1e-4, f"{name}: two tokens are as likely"
                ids.append(int(best.indices[0]))
            answers.append(ids[len(prompt) :])
        return answers


def smollm2() -> dict[str, Any]:
    """Compute token ids and greedy continuations of the default model, from the same GGUF file."""
    path = fetch(DEFAULT_MODEL)
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # transformers drops the file's pretokenizer ("smollm") and cuts as GPT-2 does. SmolLM2's own
    # tokenizer first cuts off every digit, which makes a difference where spaces precede digits.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    chats = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        for chat in CONVERSATIONS
    ]
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS] + chats
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "gguf", "tokenizers")},
        },
        "strings": [[text, tokenizer(text)["input_ids"]] for text in STRINGS],
        "chats": [[chat, ids] for chat, ids in zip(CONVERSATIONS, chats, strict=True)],
        "greedy": [[prompt, _continue(model, prompt)] for prompt in prompts],
    }


def _continue(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    return out[0, len(prompt) :].tolist()


def main() -> None:
    """Write the fixtures."""
    FIXTURES.mkdir(exist_ok=True)
    logits: dict[str, Any] = tiny_logits()
    np.savez_compressed(FIXTURES / "tiny_logits.npz", **logits)
    found = {name: greedy_tokens(name) for name in family_tokens.MODELS}
    versions = {name: version(name) for name in ("torch", "transformers")}
    text = json.dumps({"versions": versions, "answers": found})
    family_tokens.FIXTURE.write_text(text.replace('], "', '],\n"') + "\n")
    text = json.dumps(smollm2(), ensure_ascii=True, indent=None, separators=(",", ":"))
    (FIXTURES / "smollm2.json").write_text(text.replace('],["', '],\n["') + "\n")


if __name__ == "__main__":
    main()
