"""Whether KV comes up from a tier or is computed again."""

from pdjax.host.policies.api import PolicySetup
from pdjax.host.policies.tiering_api import LoadChoice


class LoadByCost:
    """Brings KV up where that is predicted to be sooner than to compute it, by what moves from the
    tier and steps of the engine have taken; so do Mooncake's conductor (Qin et al., FAST 2025) and
    SGLang's hierarchical cache, the latter by a least number of tokens. What has not been measured
    is tried: without that it never would be."""

    def __init__(self, setup: PolicySetup | None = None) -> None:
        del setup

    def loads(self, choice: LoadChoice, now: float) -> bool:
        """See `TieringPolicy`."""
        del now
        load, compute = choice.load_seconds, choice.compute_seconds
        return load is None or compute is None or load < compute


class AlwaysLoad:
    """Brings up all that a tier has."""

    def __init__(self, setup: PolicySetup | None = None) -> None:
        del setup

    def loads(self, choice: LoadChoice, now: float) -> bool:
        """See `TieringPolicy`."""
        del choice, now
        return True
