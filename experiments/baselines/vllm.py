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
