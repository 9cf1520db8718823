"""Who is where, what they hold, and how they come and go. The coordinator decides; every move of a
sequence is made here, so that what it holds is let go in one place, from whatever state it leaves.
"""

from bisect import insort
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import suppress
from typing import Any, NamedTuple

from pdjax.core.messages import reason_of
from pdjax.core.request import Request
from pdjax.host.engines import DecodeLane, InFlight, PrefillLane
from pdjax.host.kv.pages import PageAllocator
from pdjax.host.kv.prefix_index import keys_of
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.sequences.output import ending, logprobs_of
from pdjax.host.sequences.reference import Member
from pdjax.host.sequences.sequence import Sequence, State
from pdjax.interfaces.batches import NOT_FINITE, Sampled


class Progress(NamedTuple):
    """What is new of a sequence: its tokens from the `start`-th up to the `stop`-th, and whether it
    is done."""

    sequence: Sequence
    start: int
    stop: int
    finished: bool

    @property
    def token_ids(self) -> list[int]:
        """Its further tokens. Cut out when they are asked for: most often nobody does."""
        return self.sequence.output[self.start : self.stop]


class Roster:
    """All live sequences.

    Args:
      prefill, decode: the engines that they may be on.
      recorder: is told of every move.
      end_token_ids: tokens with which the model ends an answer.

    Attributes:
      live: sequences by the id of their request.
      waiting: the queue, oldest first.
      prefilled: those that wait for the decode side, oldest first.
    """

    def __init__(
        self,
        prefill: Seq[PrefillLane],
        decode: Seq[DecodeLane],
        recorder: Recorder,
        end_token_ids: Iterable[int],
    ) -> None:
        self.live: dict[str, list[Sequence]] = {}
        self.waiting: list[Sequence] = []
        self.prefilled: list[Sequence] = []
        self._prefill, self._decode = prefill, decode
        self._recorder = recorder
        self._end_token_ids = frozenset(end_token_ids)
        self._news: dict[Sequence, int] = {}  # tokens that had been told of

    @property
    def has_news(self) -> bool:
        """Whether anything was written or ended since `take_news`."""
        return bool(self._news)

    def take_news(self) -> list[Progress]:
        """What was written or ended since the last time, a sequence once."""
        news, self._news = self._news, {}
        return [Progress(seq, told, len(seq.output), seq.done) for seq, told in news.items()]

    # On its way.

    def arrive(self, request: Request, sequences: list[Sequence]) -> None:
        """All choices of a request join the queue; they are the youngest."""
        self.live[request.id] = list(sequences)
        self.waiting += sequences
        for sequence in sequences:
            self._recorder.mark(sequence, "arrived")

    def admit(self, lane: PrefillLane, newcomers: Iterable[tuple[Sequence, int, int]]) -> None:
        """From the queue to a prefill engine, each with all the pages that it needs there.

        Args:
          newcomers: sequences, the tokens of each whose KV is there already, and how many pages it
            needs in all.
        """
        newcomers, prefixes = list(newcomers), lane.pool.prefixes
        # First everybody takes what is there: to allocate may evict it.
        for sequence, cached, _ in newcomers:
            if prefixes is not None:
                sequence.pages = prefixes.take(keys_of(sequence, prefixes), cached)
                known = len(sequence.pages) * prefixes.page_size
                assert known == cached, f"{sequence.id}: {known} of {cached} tokens are there"
                sequence.found_in(prefixes, cached)
            sequence.prefilled = cached
            if not sequence.output:
                sequence.cached_tokens = cached
        for sequence, _, pages in newcomers:
            self.waiting.remove(sequence)
            sequence.pages += lane.allocator.allocate(pages - len(sequence.pages))
            sequence.engine = sequence.home = lane.index
            sequence.move(State.PREFILLING)
            insort(lane.running, sequence, key=_age)
            self._recorder.mark(sequence, "admitted")

    def computed(self, sequence: Sequence, lane: PrefillLane, tokens: int) -> None:
        """The KV of its first `tokens` tokens is there, and right: others may find it."""
        prefixes = lane.pool.prefixes
        if prefixes is not None:
            prefixes.insert(keys_of(sequence, prefixes), sequence.pages, tokens)

    def wait_for_decode(self, sequence: Sequence) -> None:
        """Its KV is complete but for the newest token's, which decode writes."""
        self._prefill[sequence.engine].running.remove(sequence)
        sequence.move(State.PREFILLED)
        insort(self.prefilled, sequence, key=_age)

    def depart(self, sequence: Sequence) -> list[int]:
        """It waits for nothing but its KV. Returns its pages, which are the caller's now."""
        self.prefilled.remove(sequence)
        return self._hand_over(sequence)

    def leave_row(self, sequence: Sequence) -> list[int]:
        """It gives up its row, but not its KV: that moves to another engine. Returns its pages,
        which are the caller's now."""
        lane = self._decode[sequence.engine]
        lane.sequences.remove(sequence)
        lane.pipeline.drop(sequence.row)
        sequence.epoch += 1
        sequence.row = -1
        return self._hand_over(sequence)

    def _hand_over(self, sequence: Sequence) -> list[int]:
        sequence.move(State.TRANSFERRING)
        pages, sequence.pages = sequence.pages, []
        self._recorder.mark(sequence, "transfer_started")
        return pages

    def seat(self, sequence: Sequence, lane: DecodeLane, row: int, pages: list[int]) -> None:
        """Let it decode in a reserved row, from the next time that this enters."""
        if sequence.state is State.PREFILLED:  # the pool is shared: it never departed
            self.prefilled.remove(sequence)
        sequence.move(State.DECODING)
        sequence.engine, sequence.row, sequence.pages = lane.index, row, pages
        lane.sequences.append(sequence)
        lane.pipeline.seat(row, sequence)
        self._recorder.mark(sequence, "decoding")

    def holders(self, lane: DecodeLane) -> list[Sequence]:
        """Those who hold pages of the lane's pool and can give them up at once."""
        holders = list(lane.sequences)
        for index in lane.shares_with:
            holders += self._prefill[index].running
            holders += [sequence for sequence in self.prefilled if sequence.engine == index]
        return holders

    def preempt(self, sequence: Sequence, *, sound: bool = True) -> None:
        """Back to the front of the queue, where only older ones stand before it; what it has
        written so far will be prefilled with its prompt.

        Args:
          sound: whether its KV is right, so that others may find it.
        """
        self._release(sequence, sound=sound)
        self._wait_again(sequence)

    def _wait_again(self, sequence: Sequence) -> None:
        sequence.start_over()
        insort(self.waiting, sequence, key=_age)
        self._recorder.mark(sequence, "preempted")

    def take_over(self, broken: "Roster", error: BaseException) -> None:
        """Take the live sequences of another roster, of which nothing but `live` and what is new
        can be relied on, since a turn was broken off by `error`.

        A sequence goes back to the queue, whatever it was doing. One that was being given a token
        fails: what comes with that token may be half done.
        """
        self._news = broken._news
        for sequence in [each for choices in broken.live.values() for each in choices]:
            self._news.setdefault(sequence, len(sequence.output))
            if sequence.done:  # only the last lines of its end are missing
                if not self._recorder.has_ended(sequence):
                    self._recorder.mark(sequence, "finished")
                continue
            self.live.setdefault(sequence.request.id, []).append(sequence)
            sequence.found.clear()  # the indices of the broken roster's pools
            self._wait_again(sequence)
            if sequence.settled != len(sequence.output):
                self.fail(sequence, error)

    # At its end.

    def accept(self, rows: Iterable[tuple[int, Member]], sampled: Sampled) -> list[Sequence]:
        """Whoever still has a use for it takes the token of his row, and ends if it is his last.
        Returns those who have ended well.

        All of them came at one moment. This is the one loop over everybody in a decode step. What
        goes wrong for one, as in the making of his text, is nobody else's business.
        """
        tokens, moment = sampled.tokens.tolist(), self._recorder.now()
        finished = []
        for row, member in rows:
            if not member.current:
                continue
            sequence, token = member.sequence, tokens[row]
            if token == NOT_FINITE:
                self.fail_not_finite(sequence)
                continue
            try:
                self._news.setdefault(sequence, len(sequence.output))
                sequence.output.append(token)
                wanted = sequence.request.params.logprobs
                if wanted is not None:
                    sequence.logprobs.append(logprobs_of(sampled, row, wanted))
                self._recorder.token(sequence, moment)
                end = ending(sequence, token, self._end_token_ids)
            except Exception as error:
                self.fail(sequence, error)
            else:
                if end is None:
                    sequence.settled += 1
                else:
                    sequence.stop_reason = end.stop_reason
                    self.end(sequence, State.FINISHED, end.finish_reason)
                    finished.append(sequence)
        return finished

    def fail_all(self, members: Iterable[Member], error: BaseException) -> None:
        """End those whose work went wrong, and who still had a use for it."""
        for member in members:
            if member.current:
                self.fail(member.sequence, error)

    def fail_not_finite(self, sequence: Sequence) -> None:
        """End a sequence that has no next token, and forget the pages that it computed."""
        for index, tokens in sequence.found.items():
            for key in keys_of(sequence, index)[tokens // index.page_size :]:
                index.forget_key(key)
        self.fail(
            sequence,
            FloatingPointError(
                f"the model's logits are not finite after {sequence.length} tokens: there is a NaN "
                "or an infinity in the model's weights, or in what it makes of these tokens"
            ),
        )

    def fail(self, sequence: Sequence, error: BaseException) -> None:
        """End it, with the reason."""
        sequence.error = reason_of(error)
        self.end(sequence, State.FAILED, "error")

    def end(self, sequence: Sequence, state: State, finish_reason: str) -> None:
        """It holds nothing any more, and is forgotten once it has been told of."""
        self._news.setdefault(sequence, len(sequence.output))
        self._release(sequence, sound=state is not State.FAILED)
        sequence.finish_reason = finish_reason
        sequence.move(state)
        if state is not State.FINISHED and sequence.text is not None:
            with suppress(Exception):  # it may be the text that went wrong
                sequence.text.finish()
        self._recorder.mark(sequence, "finished")
        choices = self.live[sequence.request.id]
        choices.remove(sequence)
        if not choices:
            del self.live[sequence.request.id]

    def _release(self, sequence: Sequence, *, sound: bool) -> None:
        """Take it from where it is, and let go of what it holds. Steps that were dispatched for it
        may still write to its pages: whatever writes there next is dispatched after them.

        Args:
          sound: whether what it has written is right, so that others may find it.
        """
        if sequence.handoff is not None:
            sequence.handoff.close()
            sequence.handoff = None
        match sequence.state:
            case State.WAITING:
                self.waiting.remove(sequence)
            case State.PREFILLING:
                lane = self._prefill[sequence.engine]
                lane.running.remove(sequence)
                lane.allocator.free(sequence.pages)
            case State.PREFILLED:
                self.prefilled.remove(sequence)
                self._prefill[sequence.engine].allocator.free(sequence.pages)
            case State.TRANSFERRING:
                pass  # what it held was the hand-off's
            case State.DECODING:
                decode = self._decode[sequence.engine]
                decode.sequences.remove(sequence)
                decode.pipeline.drop(sequence.row)
                prefixes = decode.pool.prefixes
                if sound and prefixes is not None:
                    # Of the newest token nothing is written yet.
                    prefixes.insert(
                        keys_of(sequence, prefixes), sequence.pages, sequence.length - 1
                    )
                decode.allocator.free(sequence.pages)
            case state:
                raise AssertionError(f"sequence {sequence.id} has nothing to release in {state}")
        sequence.pages, sequence.engine, sequence.row = [], -1, -1

    def pages_held(self) -> dict[PageAllocator, list[int]]:
        """The pages of each pool that a sequence holds."""
        held: dict[PageAllocator, list[int]] = {}
        for allocator, sequences in self._housed():
            held.setdefault(allocator, []).extend(page for each in sequences for page in each.pages)
        return held

    def holding(self, allocator: PageAllocator, pages: set[int] | None = None) -> list[Sequence]:
        """The sequences that hold any of these pages of a pool, or any page at all."""
        return [
            sequence
            for pool, sequences in self._housed()
            for sequence in sequences
            if pool is allocator and (pages is None or not pages.isdisjoint(sequence.pages))
        ]

    def _housed(self) -> Iterator[tuple[PageAllocator, list[Sequence]]]:
        """The sequences that hold pages of each engine's pool themselves, not by a hand-off."""
        for lane in self._prefill:
            here = [sequence for sequence in self.prefilled if sequence.engine == lane.index]
            yield lane.allocator, [*lane.running, *here]
        for decode in self._decode:
            yield decode.allocator, decode.sequences


def read(done: InFlight[Any, Sampled], roster: Roster) -> Sampled | None:
    """What has come back; None where it has failed, and those whom it was for with it."""
    try:
        return done.ticket.result()
    except BaseException as error:
        roster.fail_all(done.members, error)
        if not isinstance(error, Exception):
            raise
        return None


def _age(sequence: Sequence) -> int:
    return sequence.order
