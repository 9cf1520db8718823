"""How a report came about: command, commit, versions, hardware, seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pdjax.core.clock import utc_now
from pdjax.core.origin import commit, versions

PACKAGES = ("pdjax", "jax", "jaxlib", "numpy")


@dataclass(frozen=True)
class Origin:
    """How a report came about.

    Attributes:
      command: the command line, word by word.
      hardware: what was measured, as "2 x NVIDIA H200", or what was simulated.
      seed: of all chance; None where there is none.
      commit: of this code, with a plus where files differ from it; None where it is unknown.
      versions: of Python and packages.
      date: of the start, UTC, YYYYMMDD-HHMMSS; None where it was not kept.
    """

    command: Sequence[str]
    hardware: str
    seed: int | None
    commit: str | None
    versions: Mapping[str, str]
    date: str | None

    @classmethod
    def here(cls, command: Sequence[str], hardware: str, seed: int | None) -> "Origin":
        """That of this process, now."""
        return cls(command, hardware, seed, commit(), versions(*PACKAGES), utc_now())

    @classmethod
    def of(cls, found: Mapping[str, Any], seed: int | None) -> "Origin":
        """That which `experiments.common.origin.origin()` has found."""
        kinds = list(found["devices"])
        hardware = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
        return cls(
            found["command"],
            f"{hardware}; {found['cores']} CPU cores",
            seed,
            found["commit"],
            found["versions"],
            utc_now(),
        )

    def facts(self) -> dict[str, Any]:
        """Names and values, for a table."""
        return {
            "command": " ".join(self.command),
            "hardware": self.hardware,
            "seed": self.seed if self.seed is None else str(self.seed),
            "commit": self.commit,
            "versions": ", ".join(f"{name} {told}" for name, told in self.versions.items()),
            "date (UTC)": self.date,
        }
