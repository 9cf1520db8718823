"""What has gone to a tier and has come from it."""

from dataclasses import asdict, dataclass


@dataclass
class TierTotals:
    """Of one tier, over the whole run.

    Attributes:
      down_bytes, down_pages: that have been taken in; `up_bytes`, `up_pages`: that have been
        brought up to pools of engines. Padding does not count.
      refreshed_pages: that pools evicted and the tier had already.
      refused_pages: that pools evicted and the tier did not take in: too much was on the way, or
        the tier had no room.
      failed_pages: that did not arrive, in either direction.
      hit_tokens: of prompts, brought up instead of computed.
      recomputed_tokens: of prompts, that the tier had and the policy let be computed.
      failed_loads: times that something that a prompt waited for did not come up, so that it was
        computed.
    """

    down_bytes: int = 0
    down_pages: int = 0
    up_bytes: int = 0
    up_pages: int = 0
    refreshed_pages: int = 0
    refused_pages: int = 0
    failed_pages: int = 0
    hit_tokens: int = 0
    recomputed_tokens: int = 0
    failed_loads: int = 0

    def to_json(self) -> dict[str, int]:
        """Plain values, each under its name behind "tier_"."""
        return {f"tier_{name}": value for name, value in asdict(self).items()}
