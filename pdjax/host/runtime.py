"""What the parts of the host column share."""

from dataclasses import dataclass

from pdjax.core.clock import Clock
from pdjax.host.metrics.recorder import Recorder
from pdjax.interfaces.events import EventSource


@dataclass(frozen=True)
class Runtime:
    """Tells what happens and the time, and takes down what happened when."""

    events: EventSource
    clock: Clock
    recorder: Recorder
