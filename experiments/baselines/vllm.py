"""Numbers of vLLM 0.26.0 to print beside measurements: constants, not a run.

Unless a table says otherwise: one H100 SXM of 80 GB, Llama-3-8B shapes with all 32 layers, random
bfloat16 weights, FlashAttention 3, CUDA graphs, the engine in the client's process. They come from
another machine of the same kind, so ratios to them are good to a few percent.
"""

from typing import Any

MODEL = "llama3_8b"

DEVICE = "H100"
"""Part of the names of devices that `DECODE_MS` and `PREFILL_TOKENS_PER_S` apply to."""

DECODE_MS = {"1x1060": 6.55, "16x1060": 7.71, "64x1060": 9.99, "128x1060": 14.04}
"""Milliseconds a decode step, by rows and context."""

PREFILL_TOKENS_PER_S = {"1x1024": 37_400.0, "8x1024": 44_700.0, "1x8192": 37_400.0}
"""Prefill tokens a second; 8x1024 is from 16 such prompts in one step."""

BESIDE_PREFILL: dict[str, Any] = {
    "version": "0.26.0",
    "device": "H200",
    "point": {"model": MODEL, "rows": 64, "prompt": 1024, "long": 8192},
    "itl_ms": {
        "disaggregated quiet": (6.90, 16.1, 60.6),
        "disaggregated loaded": (7.14, 60.6, 65.0),
        "colocated quiet": (6.90, 16.1, 60.6),
        "colocated loaded": (9.91, 203.8, 205.0),
    },
}
"""Gaps between tokens beside prompts that are prefilled: (median, 99th percentile, longest), of one
run on a quiet machine.

Two H200 SXM joined by NVLink, Llama-3-8B shapes, random bfloat16 weights, prefix caching off,
chunked prefill on; disaggregated by the NIXL pull connector over UCX; one client over HTTP. An H200
reads its memory faster than an H100: compare tails and ratios with another card, not medians.
"""

POISSON: dict[str, dict[float, dict[str, float]]] = {
    "vLLM, two replicas": {
        2: {"ttft_p50": 57, "ttft_p90": 69, "tpot_p50": 4.97, "tpot_p90": 5.11, "itl_p99": 6.7},
        6: {"ttft_p50": 59, "ttft_p90": 64, "tpot_p50": 5.88, "tpot_p90": 6.46, "itl_p99": 30.3},
        10: {"ttft_p50": 60, "ttft_p90": 75, "tpot_p50": 7.00, "tpot_p90": 7.85, "itl_p99": 32.8},
        14: {"ttft_p50": 64, "ttft_p90": 89, "tpot_p50": 8.64, "tpot_p90": 10.50, "itl_p99": 36.2},
    },
    "vLLM, 1P1D": {
        2: {"ttft_p50": 103, "ttft_p90": 165, "tpot_p50": 4.94, "tpot_p90": 5.02, "itl_p99": 7.5},
        6: {"ttft_p50": 108, "ttft_p90": 152, "tpot_p50": 5.81, "tpot_p90": 6.17, "itl_p99": 13.2},
        10: {"ttft_p50": 120, "ttft_p90": 237, "tpot_p50": 6.69, "tpot_p90": 7.14, "itl_p99": 14.4},
        14: {"ttft_p50": 163, "ttft_p90": 453, "tpot_p50": 7.61, "tpot_p90": 9.12, "itl_p99": 30.8},
    },
}
"""Milliseconds by requests a second, over HTTP: prompts of 2,048 tokens and answers of 256, Poisson
arrivals, Llama-3-8B shapes, two H200 SXM joined by NVLink, of one hour; 1P1D by NIXL."""
