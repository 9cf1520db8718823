"""A scheduling policy of one's own: the shortest prompt first.

You see in which order three prompts get their first tokens, first come, first served and then
shortest first. A policy sees views and returns plans; nothing moves until the coordinator has
checked a plan, so a policy can be wrong without harm to any token.
"""

from pdjax import LLM, SamplingParams
from pdjax.host.policies.prefill import FcfsPrefill

PROMPTS = ["long " * 40, "middle " * 8, "short"]


class ShortestFirst(FcfsPrefill):
    """Packs the shortest prompt first. Long ones may starve: that is what to try next."""

    def plan(self, waiting, engines, now):
        return super().plan(sorted(waiting, key=lambda each: each.length), engines, now)


for policy in ("fcfs", ShortestFirst):
    # One prompt a step, so that the order can be seen.
    with LLM("smollm2", {"prefill.max_sequences": 1}, policies={"prefill": policy}) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=4))
    first = sorted(outputs, key=lambda output: output.metrics.ttft)
    print(getattr(policy, "__name__", policy), [output.prompt.split()[0] for output in first])
