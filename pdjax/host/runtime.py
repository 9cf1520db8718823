"""What the parts of the host column share."""

from dataclasses import dataclass

from pdjax.core.clock import Clock
from pdjax.host.kv.eviction import MakeOrder
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.sequences.guide_threads import GuideThreads
from pdjax.interfaces.events import EventSource


@dataclass(frozen=True)
class Runtime:
    """Tells what happens and the time, takes down what happened when, follows guides beside the
    turns, or does not, and makes the order in which the cached pages of a pool are evicted, or
    None, which keeps no prefixes."""

    events: EventSource
    clock: Clock
    recorder: Recorder
    guides: GuideThreads | None = None
    orders: MakeOrder | None = None
