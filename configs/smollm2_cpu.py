"""SmolLM2-135M-Instruct on 8 virtual CPU devices: prefill on a tp=3 mesh, decode on 5 stages.

Run:     make demo
         python -m experiments.quickstart --config=configs/smollm2_cpu.py
Expect:  eight chats answered, no layout-changing put, and "disaggregated = monolithic: 8 of 8
         token-exact".

Virtual devices share the machine's cores, so they show that it is right and what overlaps, not how
fast it is. The buckets are few, since each is a compilation of the whole model. The model has 3 KV
heads, so tp is 1 or 3; its 30 layers make 6 for each stage.
"""

from pdjax.config import Config, DecodeConfig, ModelConfig, PrefillConfig


def get_config() -> Config:
    """The set-up of the demo."""
    return Config(
        model=ModelConfig(source="smollm2-135m-instruct", max_model_len=512),
        prefill=PrefillConfig(
            tp=3,
            token_budget=128,
            max_sequences=4,
            token_buckets=(128,),
            page_buckets=(32,),
        ),
        decode=DecodeConfig(stages=5, rows=10, page_buckets=(32,)),
        cpu_devices=8,
    )
