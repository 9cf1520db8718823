"""Two layouts at once, on eight virtual CPU devices: prefill over three, decode over five.

You see the answer, the tokens of the same prompt from a single device (they are the same), and what
the hand-off did: heads that prefill shards over three devices arrive as layers on five. Virtual
devices share the machine's cores: they show that it is right, not how fast it is.
"""

from pdjax import LLM, SamplingParams

LAYOUT = {"prefill.tp": 3, "decode.stages": 5, "decode.rows": 10, "cpu_devices": 8}

prompt, params = "The capital of France is", SamplingParams(temperature=0.0, max_tokens=8)
with LLM("smollm2", LAYOUT) as llm:
    [answer] = llm.generate(prompt, params)
    moved = answer.metrics.transfer
print(f"{prompt}{answer.text}")
print(f"moved {moved.pages:.0f} pages, {moved.bytes:,.0f} bytes, {moved.pieces:.0f} pieces")

with LLM("smollm2_colocated") as llm:
    [alone] = llm.generate(prompt, params)
print("three + five devices:", answer.token_ids)
print("one device:          ", alone.token_ids)
