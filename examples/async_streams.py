"""Three conversations at once with asyncio, one of which is cancelled.

You see pieces of three answers, interleaved, and how the second one ends early: to cancel a task
ends its request, and its pages and its row are free at once. No request has a thread of its own,
and the event loop never waits for a device, nor for the model to load.
"""

import asyncio

from pdjax import AsyncLLM, SamplingParams

QUESTIONS = ("Name a colour.", "Count to fifty.", "Name a fruit.")


async def ask(llm: AsyncLLM, number: int, question: str) -> None:
    """Print an answer as it comes."""
    params = SamplingParams(temperature=0.0, max_tokens=24)
    async for chunk in llm.stream_chat([{"role": "user", "content": question}], params):
        print(f"{number}: {chunk.text!r}", flush=True)


async def main() -> None:
    """Ask all at once; take the second question back."""
    async with await AsyncLLM.create("smollm2") as llm:
        tasks = [asyncio.create_task(ask(llm, *each)) for each in enumerate(QUESTIONS)]
        await tasks[0]
        tasks[1].cancel()
        for number, result in enumerate(await asyncio.gather(*tasks, return_exceptions=True)):
            print(f"{number}: ended with {result!r}")


asyncio.run(main())
