"""Whether a run is long enough to say how a system serves in the long run."""

import math

ENOUGH = 10
"""Lives of requests that a run should be long."""


def too_short(requests: int, rate: float, life: float, flag: str) -> str | None:
    """A sentence where requests came for fewer than `ENOUGH` of their lives: engines are filling up
    meanwhile, and hold more than they would later. None where they came for longer.

    Args:
      requests: of the run.
      rate: at which they came, a second.
      life: seconds from a request's arrival to its last token, as is usual in the run.
      flag: that says how many requests there are.
    """
    lives = requests / rate / life
    if lives >= ENOUGH:
        return None
    more = math.ceil(requests * ENOUGH / lives / 10) * 10
    return (
        f"Requests came for {requests / rate:.1f} s at that rate, only {lives:.1f} times as long "
        "as one of them takes: engines were still filling up, and capacities may be too high. "
        f"{more} requests say more (--{flag})."
    )
