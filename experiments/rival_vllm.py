"""What vLLM 0.26.0 reached, to be printed beside what is measured: constants, not a run.

One H100 SXM of 80 GB, Llama-3-8B shapes with all 32 layers, random bfloat16 weights, FlashAttention
3, CUDA graphs, the engine in the process that asks. Another machine of the same kind than the one
that a table is made on: the ratio to it is good to a few percent.
"""

MODEL = "llama3_8b"

DECODE_MS = {"1x1060": 6.55, "16x1060": 7.71, "64x1060": 9.99, "128x1060": 14.04}
"""Milliseconds a decode step, by rows and context."""

PREFILL_TOKENS_PER_S = {"1x1024": 37_400.0, "8x1024": 44_700.0, "1x8192": 37_400.0}
"""Prefill tokens a second; 8x1024 is from 16 such prompts in one step."""
