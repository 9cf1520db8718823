"""The outcome of a step."""

from pdjax.host.engines import InFlight
from pdjax.host.sequences.lifecycle import SequenceLifecycle
from pdjax.interfaces.batches import Sampled


def read(done: InFlight, lifecycle: SequenceLifecycle) -> Sampled | None:
    """The tokens of a step that has come back; None where it has failed, and its sequences with
    it."""
    try:
        return done.ticket.result()
    except BaseException as error:
        lifecycle.fail_all(done.refs, error)
        if not isinstance(error, Exception):
            raise
        return None
