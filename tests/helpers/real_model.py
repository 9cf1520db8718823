"""SmolLM2 for tests of its answers."""

from typing import Any

CUT: dict[str, Any] = {
    "model.max_model_len": 256,
    "prefill.tp": 3,
    "prefill.token_budget": 64,
    "prefill.token_buckets": (64,),
    "prefill.page_buckets": (32,),
    "decode.stages": 2,
    "decode.row_buckets": (4,),
    "decode.page_buckets": (16,),
    "warm_up": False,
}
"""Changes of the preset `smollm2` that every test which serves the real model makes: two programs
of its layers, those of examples/colab.ipynb on a CPU, are all that is compiled, once. Prefill is
split over three devices, decode over two stages."""
