"""A checkpoint of pdjax's own: converted once, read by the slices that each device needs.

You see how long it takes to convert SmolLM2 from GGUF to bfloat16, the size of the result, and the
answer of an LLM that reads it. `pdjax convert --source=... --output=...` does the same from a
shell; a source may be anything that is served.
"""

import time
from pathlib import Path

from pdjax import LLM, SamplingParams
from pdjax.convert import convert

OUTPUT = Path("results/smollm2-bfloat16")

if not OUTPUT.exists():
    started = time.perf_counter()
    convert("smollm2-135m-instruct", OUTPUT, "bfloat16")
    size = sum(file.stat().st_size for file in OUTPUT.rglob("*") if file.is_file())
    print(f"converted in {time.perf_counter() - started:.1f} s: {size / 1e6:.0f} MB in {OUTPUT}")

with LLM("smollm2", {"model.source": OUTPUT, "model.max_model_len": 1024}) as llm:
    [answer] = llm.chat(
        [{"role": "user", "content": "What is the capital of France?"}],
        SamplingParams(temperature=0.0, max_tokens=32),
    )
print(answer.text)
