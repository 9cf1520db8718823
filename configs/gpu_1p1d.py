"""Llama 3.1 8B on two GPUs: one prefills, one decodes.

Run:     pdjax generate --config=configs/gpu_1p1d.py --chat --prompt="Why is the sky blue?"
Needs:   two GPUs with 40 GB or more, best joined by NVLink; the model's files, or access to them.
Expect:  the answer; KV leaves the first GPU while it still prefills, in as many layer groups as the
         measured link asks for. The rival on the same GPUs is configs/gpu_colocated.py.

Another model: --config.model.source=PATH_OR_ID.
"""

from pdjax.config import Config, DecodeConfig, KVConfig, ModelConfig, PrefillConfig


def get_config() -> Config:
    """Two devices, a phase each."""
    return Config(
        model=ModelConfig(
            source="meta-llama/Llama-3.1-8B-Instruct", dtype="bfloat16", max_model_len=8192
        ),
        kv=KVConfig(page_size=64),
        prefill=PrefillConfig(token_budget=2048, max_sequences=8),
        decode=DecodeConfig(rows=64, lookahead=2),
    )
