"""What a benchmark drives: engines of a config, simulated or real, or a server at a URL."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pdjax.bench.record import Played
from pdjax.bench.results import Chips
from pdjax.config import Config
from pdjax.sim.calibration import Calibration
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
      costs: of a simulation: what its steps and links take, plain values; None of others.
    """

    kind: str
    model: str
    context: int | None
    chips: Chips
    play: Callable[[list[Arrival], str], Played]
    config: Config | None
    hardware: str
    costs: Mapping[str, Any] | None = None


def simulated_system(config: Config, calibration: Calibration | None = None) -> System:
    """A config's engines, simulated.

    Args:
      config: keeps as many requests on record, `max_recorded`, as will be played at once.
      calibration: what steps and links take, of the config's model; None takes constants.

    Raises:
      ValueError: a config that cannot be simulated, or that the calibration is not of.
    """
    from pdjax.bench import simulated
    from pdjax.bench.simulated_costs import SimulatedCosts, calibrated

    name = config.model.source
    if calibration is None:
        known, served = SimulatedCosts.constant(), config
        hardware = f"simulated: {config.devices} chips, {known.hardware}"
    else:
        known, served = SimulatedCosts.of(calibration, config), calibrated(config, calibration)
        hardware = f"simulated: {config.devices} x {known.hardware}"
    cluster, longest = simulated.cluster_of(served, known.steps, known.link)
    return System(
        "sim",
        name,
        longest,
        Chips.of(config),
        lambda arrivals, salt: simulated.play(cluster, arrivals, salt),
        config,
        hardware,
        known.to_json(),
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
