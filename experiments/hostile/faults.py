"""The model that `hostile` disturbs, the ways to disturb it, and a check that it is whole again.

Each way returns how many faults happened, and after how many of those tried all was right.
"""

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

import pdjax.host
from experiments.common.llm_engines import DECODE, PREFILL, device_transport, program_of
from experiments.common.tiny import tiny_spec
from pdjax import LLM, Config, SamplingParams
from pdjax.config import RANDOM, DecodeConfig, HandoffConfig, KVConfig, ModelConfig, PrefillConfig

CONFIG = Config(
    model=ModelConfig(
        source=RANDOM,
        spec=tiny_spec(64),
    ),
    kv=KVConfig(page_size=4, prefix_cache=True),
    prefill=PrefillConfig(
        token_budget=16, max_sequences=4, token_buckets=(16,), page_buckets=(32,)
    ),
    decode=DecodeConfig(stages=2, rows=4, page_buckets=(16,)),
    handoff=HandoffConfig(layer_groups=1),  # makes a prefill step one call of the device
)
LENGTHS = (1, 5, 16, 23, 9, 2)
PARAMS = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)

HOST = str(Path(pdjax.host.__path__[0]))
DONATING = ("prefill step", "tick", "sample", "write")


def prompts(seed: int = 0) -> list[list[int]]:
    """Draw random prompts, the same for the same seed."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 101, n).tolist() for n in LENGTHS]


def answers(llm: LLM, seed: int = 0) -> list[list[int]]:
    """Return the LLM's answers to the prompts of a seed."""
    return [output.token_ids for output in llm.generate(prompts(seed), PARAMS)]


def is_whole(llm: LLM, truth: list[list[int]]) -> bool:
    """Whether the LLM's answers are right and no page or row has leaked."""
    right = answers(llm) == truth
    while llm.has_work:
        llm.step()
    llm.coordinator.check()
    return right and not llm.session.book.entries


@contextmanager
def interrupted_at(line: int) -> Iterator[list[int]]:
    """In the block, raise KeyboardInterrupt at the `line`-th executed line of pdjax/host; never for
    -1. Yield a list of one number, the lines executed so far."""
    count = [0]

    def local(frame: FrameType, event: str, arg: object) -> Any:
        if event == "line":
            count[0] += 1
            if count[0] == line:
                raise KeyboardInterrupt
        return local

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        return local if frame.f_code.co_filename.startswith(HOST) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


def signal_once(llm: LLM, draw: random.Random) -> bool:
    """Send one SIGINT at a random moment of `generate`; return whether it arrived before the end of
    the call."""
    moment = draw.uniform(0, min(_seconds(llm) for _ in range(2)))
    timer = threading.Timer(moment, os.kill, (os.getpid(), signal.SIGINT))
    generated = False
    try:
        timer.start()
        answers(llm)
        generated = True
        timer.join()
        time.sleep(0.01)  # a late signal arrives here
    except KeyboardInterrupt:
        pass
    timer.join()
    return not generated


def _seconds(llm: LLM) -> float:
    """How long `generate` takes now."""
    begun = time.perf_counter()
    answers(llm)
    return time.perf_counter() - begun


def signals(count: int, truth: list[list[int]], draw: random.Random) -> tuple[int, int]:
    """Count the LLMs that were interrupted, and those with right answers afterwards."""
    hit = right = 0
    for _ in range(count):
        with LLM(CONFIG) as llm:
            hit += signal_once(llm, draw)
            right += is_whole(llm, truth)
    return hit, right


def lines(llm: LLM, count: int, truth: list[list[int]], draw: random.Random) -> tuple[int, int]:
    """Count the interrupts from lines of the host, and those after which the LLM is whole."""
    hit = right = 0
    with interrupted_at(-1) as seen:
        answers(llm)
    for _ in range(count):
        try:
            with interrupted_at(draw.randint(1, seen[0])):
                answers(llm)
        except KeyboardInterrupt:
            hit += 1
        right += is_whole(llm, truth)
    return hit, right


class InjectedError(RuntimeError):
    """An injected failure of a device."""


def failing(llm: LLM, where: str) -> Callable[[], bool]:
    """Make the next call at `where` fail after it was carried out, when the pool that it was given
    is gone. Return a function that says whether it has failed."""
    prefill, decode = program_of(llm, PREFILL), program_of(llm, DECODE)
    [ticks] = decode._sizes.values()  # few rows have one size
    if where == "write":
        path: Any = next(iter(device_transport(llm)._paths.values()))
        plan = path.plan

        def restore() -> None:
            path.plan = plan

        path.plan = lambda layers: replace(
            plan(layers), scatter=_fails_after(plan(layers).scatter, where, restore)
        )
        return lambda: path.plan is plan
    owner, name = {
        "prefill step": (prefill, "_step"),
        "tick": (ticks, "tick"),
        "sample": (decode, "_sample"),
    }[where]
    call = getattr(owner, name)
    setattr(owner, name, _fails_after(call, where, lambda: setattr(owner, name, call)))
    return lambda: getattr(owner, name) is call


def _fails_after(
    call: Callable[..., Any], where: str, restore: Callable[[], None]
) -> Callable[..., Any]:
    """Make a call that is carried out and then fails, once."""

    def fail(*args: Any) -> Any:
        restore()
        call(*args)
        raise InjectedError(where)

    return fail


def losses(llm: LLM, count: int, truth: list[list[int]]) -> tuple[int, int]:
    """Count the failures after a donation, and those after which the LLM is whole and every request
    that did not fail had the right answer."""
    hit = right = 0
    for number in range(count):
        failed = failing(llm, DONATING[number % len(DONATING)])
        outputs = llm.generate(prompts(), PARAMS)
        hit += failed()
        others_right = all(
            output.error is not None or output.token_ids == tokens
            for output, tokens in zip(outputs, truth, strict=True)
        )
        right += is_whole(llm, truth) and others_right
    return hit, right


def threads(llm: LLM, count: int, requests: int, truth: list[list[int]]) -> tuple[int, int]:
    """Count the requests of all threads, and those with exact answers."""
    exact: list[bool] = []

    def ask(number: int) -> None:
        own_prompts = prompts()
        for turn in range(requests):
            which = (number + turn) % len(own_prompts)
            [output] = llm.generate([own_prompts[which]], PARAMS)
            exact.append(output.token_ids == truth[which])

    workers = [threading.Thread(target=ask, args=(number,)) for number in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return len(exact), sum(exact) if is_whole(llm, truth) else 0
