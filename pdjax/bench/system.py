"""What a benchmark drives: engines of a config, simulated or real, or a server at a URL."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from pdjax.bench.record import Played
from pdjax.bench.results import Chips
from pdjax.config import Config
from pdjax.sim.costs import StepCosts
from pdjax.sim.links import Link
from pdjax.workloads.arrival import Arrival


@dataclass(frozen=True)
class System:
    """What is driven.

    Attributes:
      kind: pdjax, sim, or openai of a URL.
      model: its name.
      context: tokens of the longest request; None of a URL, whose server does not tell it.
      chips: that it has.
      play: has a workload served, with prompts of a salt; see `in_process.play`.
      config: of its engines; None of a URL.
      hardware: what is measured, for a reader.
    """

    kind: str
    model: str
    context: int | None
    chips: Chips
    play: Callable[[list[Arrival], str], Played]
    config: Config | None
    hardware: str


def simulated_system(
    config: Config, costs: StepCosts | None = None, link: Link | None = None
) -> System:
    """A config's engines, simulated.

    Args:
      config: keeps as many requests on record, `max_recorded`, as will be played at once.
      costs, link: seconds of steps, and what a link can do; None takes the usual ones.

    Raises:
      ValueError: a config that cannot be simulated.
    """
    from pdjax.bench import simulated

    cluster, longest = simulated.cluster_of(config, costs, link)
    return System(
        "sim",
        config.model.source,
        longest,
        Chips.of(config),
        lambda arrivals, salt: simulated.play(cluster, arrivals, salt),
        config,
        f"simulated: {config.devices} chips",
    )


@contextmanager
def device_system(config: Config) -> Iterator[System]:
    """A config's engines in this process, until the context ends.

    Raises:
      ValueError: a config, a model or a layout that cannot work.
    """
    import jax

    from pdjax.bench import in_process
    from pdjax.llm import LLM

    with LLM(config) as llm:
        yield System(
            "pdjax",
            llm.config.model.source,
            llm.max_model_len,
            Chips.of(llm.config),
            lambda arrivals, salt: in_process.play(llm, arrivals, salt),
            llm.config,
            f"{llm.config.devices} x {jax.devices()[0].device_kind}",
        )


def server_system(
    url: str,
    *,
    model: str | None = None,
    vocab_size: int = 1000,
    api_key: str | None = None,
    timeout_s: float = 1800.0,
    chips: int | None = None,
) -> System:
    """A server with OpenAI's API.

    Args:
      url, model, vocab_size, api_key, timeout_s: as in `over_url.Target`; the server is asked for
        its model unless it is given.
      chips: that it has; None where that is not known.

    Raises:
      ValueError: seconds that are not positive, or it names no model.
      OSError: it cannot be reached.
    """
    from pdjax.bench import over_url

    if not timeout_s > 0:
        raise ValueError(f"timeout_s={timeout_s}: must be more than 0")
    target = over_url.Target(url, model, vocab_size, api_key, timeout_s)
    target = replace(target, model=model or over_url.model_of(target))
    return System(
        "openai",
        target.model or "",
        None,
        Chips.of_url(chips),
        lambda arrivals, salt: over_url.play(target, arrivals, salt),
        None,
        f"the server at {url}",
    )
