"""The baseline on a CPU: Hugging Face transformers, eager PyTorch, all cores, the same file."""

import importlib.util
import time
from typing import Any

from experiments.common.workload import Numbers, Workload
from pdjax.device.checkpoints.catalog import fetch


def installed() -> bool:
    """Whether transformers and torch are installed."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def bench(model_name: str, token_ids: list[int], work: Workload) -> Numbers:
    """Measure transformers on prompts cut from `token_ids`; a decode step includes the choice of
    tokens."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    numbers, path = Numbers(), fetch(model_name)
    model = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    ).eval()

    @torch.inference_mode()
    def forward(tokens: Any, cache: Any) -> tuple[Any, Any]:
        out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values

    one = torch.tensor([token_ids[: work.prefill]])
    seconds = work.median_seconds(lambda: forward(one, None)[0].tolist())
    numbers.prefill_tokens_per_s = work.prefill / seconds
    for rows in work.batches:
        prompts = torch.tensor(work.prompts(token_ids, rows))
        rounds = []
        for _ in range(work.rounds + 1):
            token, cache = forward(prompts, None)
            out = [token.tolist()]
            start = time.perf_counter()
            for _ in range(work.steps):
                token, cache = forward(token, cache)
                out.append(token.tolist())
            rounds.append((time.perf_counter() - start) / work.steps)
        numbers.bare_ms[rows] = sorted(rounds[1:])[work.rounds // 2] * 1e3
        numbers.token_ids[rows] = [[step[row][0] for step in out] for row in range(rows)]
    return numbers
