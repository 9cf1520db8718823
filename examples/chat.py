"""A conversation of two turns with SmolLM2, prefilled on one device and decoded on another.

You see both answers, and after each the tokens of the prompt, the seconds to the first token and
the bytes of KV that moved from the prefill device to the decode device. The second prompt holds the
first turn: its pages are found in the prefix cache, so fewer tokens are computed.
"""

from pdjax import LLM, SamplingParams

QUESTIONS = ("What is the capital of France?", "And of Italy?")

messages: list[dict[str, str]] = []
with LLM("smollm2") as llm:
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        [answer] = llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=48))
        messages.append({"role": "assistant", "content": answer.text})
        seen = answer.metrics
        print(f"> {question}\n{answer.text}")
        print(
            f"  {seen.prompt_tokens} prompt tokens, {seen.cached_tokens} of them cached; "
            f"first token after {seen.ttft:.2f} s; {seen.transfer.bytes:,.0f} bytes moved"
        )
