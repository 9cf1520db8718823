"""Llama 3.1 8B on four GPUs: prefill tensor parallel over two, decode in two stages on the others.

Run:     pdjax generate --config=configs/gpu_tp_prefill_staged_decode.py --chat --prompt="Hello"
Needs:   four GPUs with 24 GB or more; the model's files, or access to them.
Expect:  the answer. KV leaves sharded by heads and arrives sharded by layers; each piece goes from
         one device to one device, so no put changes a layout.

Two GPUs can do it, too: --config.shared_devices gives both phases the same two.
Another model: --config.model.source=PATH_OR_ID.
"""

from pdjax.config import Config, DecodeConfig, KVConfig, ModelConfig, PrefillConfig


def get_config() -> Config:
    """A layout for each phase."""
    return Config(
        model=ModelConfig(
            source="meta-llama/Llama-3.1-8B-Instruct", dtype="bfloat16", max_model_len=8192
        ),
        kv=KVConfig(page_size=64),
        prefill=PrefillConfig(tp=2, token_budget=4096, max_sequences=8),
        decode=DecodeConfig(stages=2, rows=128, lookahead=2),
    )
