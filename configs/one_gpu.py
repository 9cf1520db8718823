"""Llama 3.1 8B on one GPU, which does both phases over one pool of pages.

Run:     pdjax generate --config=configs/one_gpu.py --chat --prompt="Why is the sky blue?"
Needs:   one GPU with 40 GB or more; the model's files, or access to them on the Hugging Face Hub.
Expect:  the answer; a hand-off moves ownership of pages, and no bytes.

Another model: --config.model.source=PATH_OR_ID.
"""

from pdjax.config import Config, DecodeConfig, KVConfig, ModelConfig, PrefillConfig


def get_config() -> Config:
    """Both phases on one device."""
    return Config(
        model=ModelConfig(
            source="meta-llama/Llama-3.1-8B-Instruct", dtype="bfloat16", max_model_len=8192
        ),
        kv=KVConfig(page_size=64),
        prefill=PrefillConfig(token_budget=2048, max_sequences=8),
        decode=DecodeConfig(rows=64),
        colocated=True,
    )
