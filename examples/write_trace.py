"""A trace of a run, to look at in Perfetto, and its report against bounds on latency.

You see the share of requests that met both bounds, where a request's time went, and the name of a
file. Open it at https://ui.perfetto.dev: a track an engine, a slice a step, and the hand-offs
between them. docs/metrics.md defines every number.
"""

from pdjax import LLM, SLO, SamplingParams

PROMPTS = ["The sea is", "The moon is", "A friend is", "Once upon a time"]

with LLM("smollm2", {"decode.rows": 2}) as llm:
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=12))
    report = llm.report(SLO(ttft=1.0, itl=0.5))  # seconds
    llm.write_trace("results/trace.json")

print(f"{report['slo_attainment']:.0%} of the requests met both bounds")
for output in outputs:
    seen = output.metrics
    print(f"{output.prompt!r}: first token after {seen.ttft:.2f} s, then {seen.tpot:.3f} s a token")
print("results/trace.json: open it at https://ui.perfetto.dev")
