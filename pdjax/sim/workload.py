"""What is asked of a simulated cluster: requests by their lengths, and when they arrive."""

import random
from collections.abc import Iterable
from dataclasses import dataclass

from pdjax.core.request import Request, SamplingParams


@dataclass(frozen=True)
class Arrival:
    """One request to come.

    Attributes:
      moment: when it arrives, seconds on the cluster's clock.
      prompt: tokens of its prompt.
      output: tokens that are generated.

    Raises:
      ValueError: a moment before the start, or a length below one.
    """

    moment: float
    prompt: int
    output: int

    def __post_init__(self) -> None:
        if not self.moment >= 0:
            raise ValueError(f"moment={self.moment}: must be 0 or more")
        for name in ("prompt", "output"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1 token")

    def request(self, index: int, vocab_size: int) -> Request:
        """The `index`-th request of a workload. Prompts share no prefix: each begins with its
        index, written in token ids."""
        rest, head = index, list[int]()
        for _ in range(4):
            rest, digit = divmod(rest, vocab_size - 1)
            head.append(1 + digit)
        prompt = (*head, *[1] * (self.prompt - len(head)))[: self.prompt]
        params = SamplingParams(
            temperature=0.0, seed=index, max_tokens=self.output, ignore_eos=True
        )
        return Request(f"r{index}", prompt, params, self.moment)


def poisson(
    rate: float,
    count: int,
    prompt: tuple[int, int] = (100, 2000),
    output: tuple[int, int] = (20, 200),
    seed: int = 0,
) -> list[Arrival]:
    """Independent arrivals, of lengths that are uniform between bounds, both included.

    Args:
      rate: requests a second.
      count: how many.
      prompt, output: shortest and longest, tokens.
      seed: of all chance.

    Raises:
      ValueError: a rate that is not positive.
    """
    if not rate > 0:
        raise ValueError(f"rate={rate}: must be more than 0 requests a second")
    chance, moment, arrivals = random.Random(seed), 0.0, list[Arrival]()
    for _ in range(count):
        moment += chance.expovariate(rate)
        arrivals.append(Arrival(moment, chance.randint(*prompt), chance.randint(*output)))
    return arrivals


def regular(interval: float, lengths: Iterable[tuple[int, int]]) -> list[Arrival]:
    """Arrivals at equal intervals of seconds, from 0 on, of given (prompt, output) lengths."""
    return [Arrival(i * interval, *both) for i, both in enumerate(lengths)]
