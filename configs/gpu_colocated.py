"""Llama 3.1 8B on two GPUs that do both phases together, tensor parallel: the rival of 1P1D.

Run:     pdjax generate --config=configs/gpu_colocated.py --chat --prompt="Why is the sky blue?"
Needs:   two GPUs with 24 GB or more; the model's files, or access to them.
Expect:  the answer. Long prompts are cut into chunks of the token budget, and decode waits for each
         chunk: a smaller budget shortens the wait and costs throughput of prefill.

Another model: --config.model.source=PATH_OR_ID.
"""

from pdjax.config import Config, DecodeConfig, KVConfig, ModelConfig, PrefillConfig


def get_config() -> Config:
    """Both phases on a mesh of two."""
    return Config(
        model=ModelConfig(
            source="meta-llama/Llama-3.1-8B-Instruct", dtype="bfloat16", max_model_len=8192
        ),
        kv=KVConfig(page_size=64),
        prefill=PrefillConfig(tp=2, token_budget=512, max_sequences=8),
        decode=DecodeConfig(tp=2, rows=128),
        colocated=True,
    )
