"""Prompts that requests pin: when they are pinned, and when their pages are let go of."""

from pdjax.host.fleet import Fleet
from pdjax.host.handoff.deadlines import NEVER
from pdjax.host.runtime import Runtime
from pdjax.host.sequences.lifecycle import SequenceLifecycle
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.events import TimerDue

UNPIN = TimerDue("pins")
"""Tells that a pin may have ended."""


class Pinning:
    """Pins prompts, and lets go of them; sets one timer, for the pin that may end first.

    Args:
      fleet, lifecycle: the pools, and who is in which.
      runtime: timers and clock.
    """

    def __init__(self, fleet: Fleet, lifecycle: SequenceLifecycle, runtime: Runtime) -> None:
        self._fleet, self._lifecycle = fleet, lifecycle
        self._events, self._clock = runtime.events, runtime.clock
        self._timer = NEVER

    def prefilled(self, sequence: Sequence) -> None:
        """A prompt has been computed, for a sequence without a token so far: pin it where it is for
        as long as its request says, or let go of it in all pools. The first choice of a request
        does that for all of them."""
        seconds = sequence.request.cache_pin
        if seconds is None or sequence.choice:
            return
        if not seconds:
            for pool in self._fleet.pools.values():
                pool.unpin(sequence)
            return
        pool, now = self._lifecycle.pool_of(sequence), self._clock.now()
        if pool.pins is not None:
            pool.pins.expire(now)
        if pool.pin(sequence, now + seconds):
            self._expect(now + seconds)

    def expire(self) -> None:
        """Let go of the prompts whose moment has come, now that the timer is due."""
        now = self._clock.now()
        if now < self._timer:
            return
        self._timer = NEVER
        pins = [pool.pins for pool in self._fleet.pools.values() if pool.pins is not None]
        for each in pins:
            each.expire(now)
        self._expect(min((each.earliest for each in pins), default=NEVER))

    def _expect(self, moment: float) -> None:
        if moment < self._timer:
            self._timer = moment
            self._events.at(moment, UNPIN)
