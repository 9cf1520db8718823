"""From a prefill engine to a decode engine: reserve, then move, then release."""

from dataclasses import dataclass

from pdjax.clock import Clock
from pdjax.engine_api import Transfer, TransferCost
from pdjax.host.batch import Buckets, handoff_pages
from pdjax.host.lanes import DecodeLane, InFlight, PrefillLane, is_ready
from pdjax.host.member import Member
from pdjax.host.metrics import Recorder
from pdjax.host.roster import Roster
from pdjax.request import Sequence


@dataclass(frozen=True, eq=False)
class Handoff:
    """A sequence between two engines. The pages of both ends and the row are the hand-off's own
    until the copy has arrived, even if nobody wants it any longer: it cannot be called back."""

    sequence: Sequence
    source: PrefillLane
    target: DecodeLane
    source_pages: list[int]
    target_pages: list[int]
    row: int

    @property
    def track(self) -> str:
        """Its name in metrics."""
        return f"transfer/{self.source.index}->{self.target.index}"

    def release_source(self) -> None:
        """Let go of the pages that were copied."""
        self.source.allocator.free(self.source_pages)

    def release_target(self) -> None:
        """Let go of the pages and the row that were to be used."""
        self.target.allocator.free(self.target_pages)
        self.target.pipeline.drop(self.row)


class Handoffs:
    """Those in flight. There are never more than the decode side has reserved room for."""

    def __init__(
        self,
        transfer: Transfer,
        roster: Roster,
        buckets: Buckets,
        clock: Clock,
        recorder: Recorder,
    ) -> None:
        self._transfer, self._roster, self._buckets = transfer, roster, buckets
        self._clock, self._recorder = clock, recorder
        self._in_flight: list[InFlight[Handoff, TransferCost]] = []

    @property
    def in_flight(self) -> list[Handoff]:
        """Those that have begun and not landed."""
        return [done.work for done in self._in_flight]

    def begin(
        self, sequence: Sequence, source: PrefillLane, target: DecodeLane, pages: int
    ) -> None:
        """Reserve a row and `pages` pages of the target, then begin to move. Where both ends share
        a pool there is nothing to move."""
        row = target.pipeline.reserve()
        if target.shares_with:
            self._roster.seat(sequence, target, row, sequence.pages)
            return
        target_pages = target.allocator.allocate(pages)
        source_pages = self._roster.depart(sequence)
        handoff = Handoff(sequence, source, target, source_pages, target_pages, row)
        started, moved = self._clock.now(), len(source_pages)
        try:
            ticket = self._transfer.start(
                source.index,
                target.index,
                handoff_pages(source_pages, self._buckets),
                # The newest token has no KV yet: the page that it may open has nothing to receive.
                handoff_pages(target_pages[:moved], self._buckets),
                moved,
            )
        except BaseException as error:
            handoff.release_source()
            handoff.release_target()
            self._roster.fail(sequence, error)
            if not isinstance(error, Exception):
                raise
        else:
            members = (Member.of(sequence),)
            self._in_flight.append(InFlight(handoff, ticket, started, members))

    def land(self) -> bool:
        """Let those that have arrived decode. Returns whether there were any."""
        arrived = [done for done in self._in_flight if is_ready(done.ticket)]
        for done in arrived:
            self._in_flight.remove(done)
            self._land(done)
        return bool(arrived)

    def _land(self, done: InFlight[Handoff, TransferCost]) -> None:
        """Write into the target's pool what is still wanted, then release the source."""
        handoff, sequence, now = done.work, done.work.sequence, self._clock.now()
        try:
            cost = done.ticket.result()
            if not sequence.done:
                self._transfer.land(done.ticket)
        except BaseException as error:
            self._roster.fail_all(done.members, error)
            if not isinstance(error, Exception):
                raise
        else:
            self._recorder.span(
                handoff.track, sequence.id, done.started, now, bytes=cost.bytes, pages=cost.pages
            )
            self._recorder.transfer(sequence, cost, now - done.started)
        finally:
            handoff.release_source()
            if sequence.done:
                handoff.release_target()
            else:
                self._recorder.mark(sequence, "transfer_landed")
                self._roster.seat(sequence, handoff.target, handoff.row, handoff.target_pages)
