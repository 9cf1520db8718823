"""The first tick of a lone sequence, dispatched before the host knows the sequence's first token.

To dispatch a tick takes the host a millisecond or two, which later ticks hide behind the one before
them. The first tick of a sequence that decodes alone has none before it. So while its prefill step
computes the last layer group, the KV of that group is written as it arrives, the step's token is
fed to the decode engine, and the row begins: the devices wait for one another, and the host for
none of them.

The sequence itself comes no sooner. Its hand-off stays open until the host has seen its token and
all of its KV, and no tick of the engine is read before that. Whatever ends the sequence or the
hand-off until then releases the row, as ever.

Whatever the engine is asked meanwhile waits with the tick, for a layer group and the choice of a
token at most. So a row begins this way only where it is the engine's only one.
"""

from pdjax.config import HandoffConfig
from pdjax.host.handoff.handoff import Handoff
from pdjax.host.handoff.transfer_queue import TransferQueue
from pdjax.interfaces.engine import StepTicket
from pdjax.interfaces.transport import Transport


class RunAhead:
    """Begins the rows that can run ahead.

    Args:
      config: whether pages are checked, which takes the host.
      transport: says between which pools devices wait for one another.
      queue: sends and writes KV.
    """

    def __init__(self, config: HandoffConfig, transport: Transport, queue: TransferQueue) -> None:
        self._checked, self._transport, self._queue = config.checksums, transport, queue
        self._coming: dict[int, Handoff] = {}  # whose sequences' last chunks are being computed

    def computing(self, handoff: Handoff, step: StepTicket, index: int) -> None:
        """A step has been dispatched that chooses the first token of a hand-off's sequence, its
        `index`-th."""
        handoff.chooses = step, index
        if self._can_begin(handoff):
            self._coming[handoff.id] = handoff

    def _can_begin(self, handoff: Handoff) -> bool:
        """Whether its row is the only one, and the devices need no host: masks and penalties need
        the token."""
        sequence, state = handoff.sequence, handoff.engine
        return (
            state is not None
            and state.rows.taken_rows == 1
            and not self._checked
            and self._transport.writes_ahead(*handoff.ends)
            and sequence.constraint is None
            and not sequence.request.params.penalized
            and sequence.length < sequence.lifetime_tokens
        )

    def begin(self) -> bool:
        """Begin the rows whose KV is there but for the last layer group. Returns whether there was
        any."""
        begun = False
        for handoff in list(self._coming.values()):
            if handoff.closed or handoff.departed is not None:
                del self._coming[handoff.id]
            elif _is_time(handoff):
                del self._coming[handoff.id]
                self._queue.write_ahead(handoff)
                if handoff.nearly_written:  # else that has failed
                    begun |= handoff.run_ahead()
        return begun


def _is_time(handoff: Handoff) -> bool:
    """Whether nothing but the last layer group is missing, which has been dispatched, and the
    engine has nothing else to do."""
    state = handoff.engine
    assert state is not None and handoff.chooses is not None, "its sequence is to decode"
    alone = state.rows.taken_rows == 1 and not state.in_flight and not state.paused
    return alone and handoff.chooses[0].made and handoff.nearly_written
