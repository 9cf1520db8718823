"""Two answers to one prompt, as they come.

You see the pieces of text in the order in which they are made, each with the number of its choice,
and at the end why each choice ended. To leave the loop early, or to drop the stream, ends the
request.
"""

from pdjax import LLM, SamplingParams

params = SamplingParams(temperature=0.8, seed=1, n=2, max_tokens=24)
with LLM("smollm2") as llm:
    for chunk in llm.stream("Once upon a time", params):
        print(f"[{chunk.choice}] {chunk.text!r}", flush=True)
        if chunk.finish_reason:
            print(f"[{chunk.choice}] ended: {chunk.finish_reason}")
