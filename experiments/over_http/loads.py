"""Loads, the two ways to send them, and what came of them."""

import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pdjax.core.request import SamplingParams
from pdjax.llm import LLM

CLIENT = "experiments.over_http.client"
ROOT = Path(__file__).resolve().parents[2]
LEAD_S = 0.2

Moments = list[list[float]]
"""Of each request, seconds from when it was sent to each event or chunk. One may bring several
tokens to a reader that is late."""


@dataclass(frozen=True)
class Load:
    """Requests that are due at moments of their own.

    Attributes:
      arrivals: seconds after the start.
      prompts: token ids.
      max_tokens: of each answer.
    """

    arrivals: list[float]
    prompts: list[list[int]]
    max_tokens: int

    @classmethod
    def poisson(
        cls, rate: float, seconds: float, prompt: int, output: int, vocab_size: int, seed: int
    ) -> "Load":
        """Arrivals of a Poisson process of `rate` a second, and random prompts of one length."""
        generator = np.random.default_rng(seed)
        count = max(2, round(rate * seconds))
        arrivals = np.cumsum(generator.exponential(1 / rate, count))
        prompts = generator.integers(0, vocab_size, (count, prompt))
        return cls(arrivals.tolist(), prompts.tolist(), output)


def in_the_loop(llm: LLM, load: Load) -> Moments:
    """Submit to the session from a thread of this process; the moments are those of the
    coordinator's events."""
    params = SamplingParams(temperature=0.0, max_tokens=load.max_tokens, ignore_eos=True)
    requests = [llm.requests.of_prompt(tuple(p), params, {}).request for p in load.prompts]
    moments: Moments = [[] for _ in requests]
    left, end = [len(requests)], threading.Event()
    began = time.perf_counter() + LEAD_S

    def listener(number: int, sent: float) -> Any:
        def hear(event: Any) -> None:
            if event.token_ids:
                moments[number].append(time.perf_counter() - sent)
            if event.output is not None:
                left[0] -= 1
                if not left[0]:
                    end.set()

        return hear

    for number, (arrival, request) in enumerate(zip(load.arrivals, requests, strict=True)):
        time.sleep(max(0.0, began + arrival - time.perf_counter()))
        llm.session.submit(request, on_event=listener(number, time.perf_counter()))
    end.wait()
    return moments


def over_http(port: int, load: Load) -> Moments:
    """Send them from another process.

    Raises:
      ValueError: the client has failed.
    """
    command = [sys.executable, "-m", CLIENT, str(port)]
    done = subprocess.run(
        command,
        input=json.dumps(asdict(load)),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        cwd=ROOT,
    )
    if done.returncode:
        raise ValueError(f"{' '.join(command)}: failed")
    return json.loads(done.stdout)


def _tpots(moments: Moments, tokens: int) -> np.ndarray:
    """Of each request: the time from its first chunk to its last, by the tokens after the first."""
    return np.array([(each[-1] - each[0]) / max(1, tokens - 1) for each in moments])


def summary(moments: Moments, tokens: int) -> dict[str, float]:
    """Percentiles, milliseconds; ITL is of a gap between chunks that came apart.

    Args:
      moments: of each request.
      tokens: of each answer.
    """
    firsts = np.array([each[0] for each in moments]) * 1e3
    tpot = _tpots(moments, tokens) * 1e3
    gaps = np.concatenate([np.diff(np.unique(each)) for each in moments]) * 1e3
    found = {f"ttft_p{q}": float(np.percentile(firsts, q)) for q in (50, 90, 99)}
    found |= {f"tpot_p{q}": float(np.percentile(tpot, q)) for q in (50, 90)}
    counts = sum(map(len, moments))
    return found | {
        "itl_p99": float(np.percentile(gaps, 99)) if gaps.size else 0.0,
        "requests": len(moments),
        "tokens_per_chunk": len(moments) * tokens / counts,
    }


def added(http: Moments, loop: Moments, tokens: int) -> dict[str, float]:
    """Medians of the differences between a request and the same request in the loop,
    milliseconds."""
    firsts = [a[0] - b[0] for a, b in zip(http, loop, strict=True)]
    tpot = _tpots(http, tokens) - _tpots(loop, tokens)
    return {
        "ttft_added": float(np.median(firsts)) * 1e3,
        "tpot_added": float(np.median(tpot)) * 1e3,
    }
