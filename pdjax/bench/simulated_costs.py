"""What the steps and links of a simulated benchmark take, and where that is from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pdjax.config import RANDOM, Config
from pdjax.sim.calibration import Calibration, check_one_chip
from pdjax.sim.costs import StepCosts
from pdjax.sim.links import Link


@dataclass(frozen=True)
class SimulatedCosts:
    """Of a simulation's steps and links.

    Attributes:
      steps: what they take.
      link: between two pools; None where no two are linked and nothing is known.
      name: of the calibration, or the path of its file; None of constants.
      hardware: that they were measured on, for a reader.
      sentences: what they are of, for a reader.
      sources: the measurements.
    """

    steps: StepCosts
    link: Link | None
    name: str | None
    hardware: str
    sentences: tuple[str, ...]
    sources: tuple[str, ...] = ()

    @classmethod
    def constant(cls) -> "SimulatedCosts":
        """The usual constants, which are of no hardware."""
        steps, link = StepCosts(), Link()
        told = (
            f"Steps cost constants that were measured on no hardware: a prefill step "
            f"{1e6 * steps.prefill_token:.1f} us a token, a decode tick {1e3 * steps.tick:g} ms, "
            f"the writing of a transfer {1e6 * steps.write:g} us.",
            _told(link),
        )
        return cls(steps, link, None, "constant costs", told)

    @classmethod
    def of(cls, calibration: Calibration, config: Config) -> "SimulatedCosts":
        """Those of a calibration.

        Raises:
          ValueError: engines of several chips, or pools that are linked where it has no link.
        """
        check_one_chip(config)
        link = calibration.link
        if link is None and not config.colocated:
            raise ValueError(
                f"costs={calibration.name}: does not say what the link between two chips can do; "
                "must be of a calibration that does, or of a config that is colocated"
            )
        told = [*calibration.validity(), *([_told(link)] if link else [])]
        hardware, sources = calibration.hardware, calibration.sources
        return cls(calibration.costs, link, calibration.name, hardware, tuple(told), sources)

    def to_json(self) -> Mapping[str, Any]:
        """Plain values, in seconds and bytes a second."""
        return {
            "name": self.name,
            "hardware": self.hardware,
            "sentences": list(self.sentences),
            "sources": list(self.sources),
            "coefficients": asdict(self.steps),
            "link": asdict(self.link) if self.link else None,
        }


def calibrated(config: Config, calibration: Calibration) -> Config:
    """The config with the shapes of its model, which must be those of the calibration; no weights
    are read.

    Raises:
      ValueError: a model that the calibration is not of, or that cannot be opened.
    """
    from pdjax.explain.model import spec_of  # starts JAX

    spec = spec_of(config, calibration, assumed=False)
    longest = config.model.max_model_len or spec.context
    model = replace(config.model, source=RANDOM, spec=spec, max_model_len=longest)
    return replace(config, model=model)


def _told(link: Link) -> str:
    return (
        f"A link between two pools carries {link.bandwidth / 1e9:.3g} GB/s, after "
        f"{1e6 * link.latency:.3g} us."
    )
