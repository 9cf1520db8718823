"""A loop of one's own: requests arrive while others are served.

You see a line when each request arrives, its pieces of text as turns make them, and its whole
answer. `generate` and `stream` drive the same `step`; an experiment that needs to act between two
turns (to submit, to watch, to abort) calls it itself.
"""

from pdjax import LLM, SamplingParams

ARRIVALS = {0.0: "The sea is", 0.2: "The moon is", 0.4: "A friend is"}  # moment in seconds: prompt

params = SamplingParams(temperature=0.0, max_tokens=12)
with LLM("smollm2") as llm:
    start, waiting, asked = llm.clock.now(), dict(ARRIVALS), dict[str, str]()
    while waiting or asked:
        now = llm.clock.now() - start
        for moment in [each for each in waiting if each <= now]:
            prompt = waiting.pop(moment)
            asked[llm.submit(prompt, params, on_text=lambda text: print(f"  {text!r}"))] = prompt
            print(f"{now:6.2f} s: {prompt!r} arrives")
        llm.step()
        for id in list(asked):
            if (output := llm.take_output(id)) is not None:
                print(f"{llm.clock.now() - start:6.2f} s: {asked.pop(id)!r}{output.text!r}")
