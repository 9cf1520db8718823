"""Every move of a sequence, so that what it holds is let go in one place, whatever state it leaves.
The coordinator and its runners decide which move is made."""

from bisect import insort
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from pdjax.core.messages import reason_of
from pdjax.core.request import Request
from pdjax.host.engines import EngineState
from pdjax.host.fleet import Fleet
from pdjax.host.kv.pools import PoolState
from pdjax.host.kv.prefix_index import keys_of
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.policies.api import Policies
from pdjax.host.sequences.news import Progress
from pdjax.host.sequences.queue import SequenceQueue
from pdjax.host.sequences.ranking import Ranking
from pdjax.host.sequences.reference import SequenceRef, current
from pdjax.host.sequences.sequence import Sequence, State, age


class SequenceLifecycle:
    """All live sequences, and their moves.

    Args:
      fleet: the engines and pools that they may be on.
      recorder: is told of every move.
      policies: may give queues an order; None keeps the oldest first.

    Attributes:
      live: sequences by the id of their request.
      waiting: the queue, oldest first or by the prefill policy's `rank`; `waiting_changed`: whether
        it has changed since the coordinator last planned.
      arrived: sequences that came into the queue since the loop last looked.
      prompt_tokens: of all prompts that have been queued.
      held: sequences that come into the queue when it is known which tokens may follow their last,
        or when the prompt of their request has been computed for its first choice.
      loading: sequences that wait for KV from a tier.
      prefilled: sequences that wait for the decode side, oldest first or by the decode policy's
        `rank`; `prefilled_changed` likewise.
      news: sequences of which something is new, and how many tokens of each have been told; `note`.
    """

    def __init__(self, fleet: Fleet, recorder: Recorder, policies: Policies | None = None) -> None:
        self.live: dict[str, list[Sequence]] = {}
        self.arrived, self.prompt_tokens = list[Sequence](), 0
        self.held, self.loading = dict[Sequence, None](), dict[Sequence, None]()  # sets in order
        self.waiting_changed = self.prefilled_changed = False
        self._fleet, self._recorder = fleet, recorder
        self._ranking = Ranking(policies)
        self._others: dict[Sequence, list[Sequence]] = {}  # that wait for a first choice
        self.waiting, self.prefilled = SequenceQueue(self._ranking.group), SequenceQueue()
        self.news: dict[Sequence, int] = {}

    @property
    def has_news(self) -> bool:
        """Whether a token was added or a sequence ended since `take_news`."""
        return bool(self.news)

    def take_news(self) -> list[Progress]:
        """What was added or ended since the last time, a sequence once."""
        if not self.news:
            return []
        news, self.news = self.news, {}
        return [Progress(seq, told, len(seq.output), seq.done) for seq, told in news.items()]

    def engine_of(self, sequence: Sequence) -> EngineState:
        """The engine that a sequence is on."""
        assert sequence.engine is not None, f"{sequence.id} is on no engine"
        return self._fleet.engines[sequence.engine]

    def pool_of(self, sequence: Sequence) -> PoolState:
        """The pool that holds a sequence's pages."""
        assert sequence.pool is not None, f"{sequence.id} holds no pages"
        return self._fleet.pools[sequence.pool]

    # On its way.

    def add(self, request: Request, sequences: list[Sequence]) -> None:
        """Queue all choices of a request; they are the youngest. Where the others find the prompt
        of the first one in a prefix cache, they are held until it has been computed."""
        self.live[request.id] = list(sequences)
        for sequence in sequences:
            self._recorder.mark(sequence, "arrived")
            self.prompt_tokens += sequence.prompt_len
        if len(sequences) > 1 and self._fleet.shares(sequences[1].reusable):
            self._others[sequences[0]] = sequences[1:]
            self.held.update(dict.fromkeys(sequences[1:]))
            sequences = sequences[:1]
        self.waiting_changed = True
        self.arrived += sequences
        for sequence in sequences:
            self._insert(self.waiting, sequence)

    def start_loading(self, sequence: Sequence, load: Any) -> None:
        """Take a sequence out of the queue until a `load` has come up, or is closed with it."""
        self.waiting.remove(sequence)
        self.loading[sequence], sequence.handoff = None, load
        self._move(sequence, State.LOADING)

    def end_loading(self, sequence: Sequence) -> None:
        """Put a sequence back to its place in the queue, its load having ended."""
        del self.loading[sequence]
        sequence.handoff = None
        self._move(sequence, State.WAITING)
        self._queue(sequence)

    def start_prefill(
        self, state: EngineState, newcomers: Iterable[tuple[Sequence, int, int]]
    ) -> None:
        """Take sequences from the queue to an engine, each with all the pages that it needs there.

        Args:
          newcomers: sequences, the tokens of each whose KV is in the pool already, and how many
            pages it needs in all.
        """
        newcomers, pool = list(newcomers), state.pool
        # First all of them take what is there: to allocate may evict it.
        for sequence, cached, _ in newcomers:
            if pool.prefixes is not None:
                sequence.pages = pool.prefixes.serve(sequence, cached)
                known, size = len(sequence.pages), pool.prefixes.page_size
                assert known == cached // size, f"{sequence.id}: {known} pages of {cached} tokens"
                sequence.found_in(pool.prefixes, cached)
            sequence.prefilled = cached
            if not sequence.output:
                sequence.cached_tokens = cached
        for sequence, _, pages in newcomers:
            self.waiting.remove(sequence)
            sequence.pages += pool.allocator.allocate(pages - len(sequence.pages))
            sequence.engine = sequence.home = state.id
            sequence.pool = pool.id
            self._move(sequence, State.PREFILLING)
            self._recorder.prefilled_at(sequence, local=state.role.decodes)
            insort(state.running, sequence, key=age)

    def computed(self, sequence: Sequence, tokens: int) -> None:
        """The KV of its first `tokens` tokens is in its pool, and right: it can be found there."""
        prefixes = self.pool_of(sequence).prefixes
        if prefixes is not None:
            prefixes.add(sequence, sequence.pages, tokens)
        if tokens >= sequence.prompt_len and sequence in self._others:
            self._let_others_in(sequence)

    def _let_others_in(self, first: Sequence) -> None:
        """The choices that wait for the prompt of the first one need not wait any longer."""
        for sequence in self._others.pop(first):
            if sequence in self.held and not sequence.behind:
                del self.held[sequence]
                self.arrived.append(sequence)
                self._queue(sequence)

    def wait_for_decode(self, sequence: Sequence) -> None:
        """Its KV is complete but for the newest token's, which decode writes."""
        self.engine_of(sequence).running.remove(sequence)
        self._move(sequence, State.PREFILLED)
        self._recorder.mark(sequence, "prefilled")
        self._insert(self.prefilled, sequence)
        self.prefilled_changed = True

    def detach(self, sequence: Sequence) -> list[int]:
        """It waits for nothing but its KV. Returns its pages, which are the caller's now."""
        self.prefilled.remove(sequence)
        self.prefilled_changed = True
        return self._hand_over(sequence)

    def leave_row(self, sequence: Sequence) -> list[int]:
        """It gives up its row, but not its KV, which moves to another engine. Returns its pages,
        which are the caller's now."""
        state = self.engine_of(sequence)
        state.leave_row(sequence)
        state.rows.release(sequence.row)
        sequence.epoch += 1
        return self._hand_over(sequence)

    def _hand_over(self, sequence: Sequence) -> list[int]:
        self.pool_of(sequence).written(sequence)
        pages = sequence.pages
        for state in self._fleet.sharing(self.pool_of(sequence)):  # the pages are leaving it
            self._fleet.touch(state)
        self._move(sequence, State.TRANSFERRING)
        sequence.leave()
        self._recorder.mark(sequence, "transfer_started")
        return pages

    def start_decoding(
        self, sequence: Sequence, state: EngineState, row: int, pages: list[int]
    ) -> None:
        """Let it decode in a reserved row, from when this next enters."""
        if sequence.state is State.PREFILLED:  # its KV is in the engine's pool: it never left
            self.prefilled.remove(sequence)
            self.prefilled_changed = True
            self._fleet.touch(self.engine_of(sequence))
        self._move(sequence, State.DECODING)
        sequence.engine, sequence.row, sequence.pages = state.id, row, pages
        sequence.pool = state.pool.id
        state.take_row(sequence)
        runs_ahead = state.rows.ahead == row
        state.rows.assign(row, sequence)
        self._recorder.mark(sequence, "decoding")
        if runs_ahead:
            self._recorder.mark(sequence, "first_tick")

    def go_on(self, sequence: Sequence) -> None:
        """It is known which tokens may follow a constrained sequence's newest one: let it go on,
        wherever it has waited for that."""
        if sequence.mask is None:
            sequence.constraint = None  # nor will it have another
        match sequence.state:
            case State.DECODING:
                self.engine_of(sequence).rows.resume(sequence.row)
            case State.PREFILLING:  # its next token is made there, too
                self._fleet.touch(self.engine_of(sequence))
            case State.WAITING if sequence in self.held:
                del self.held[sequence]
                self._queue(sequence)

    def preempt(self, sequence: Sequence, *, sound: bool = True) -> None:
        """Send it back to its place in the queue, of which the oldest is the front; what it has
        written so far will be prefilled with its prompt.

        Args:
          sound: whether its KV is right, so that it may be found.
        """
        self._release(sequence, sound=sound)
        self._wait_again(sequence)

    def _wait_again(self, sequence: Sequence) -> None:
        before = sequence.state
        sequence.start_over()
        self._recorder.observer.sequence_moved(sequence, before, State.WAITING)
        self._queue(sequence)
        self._recorder.mark(sequence, "preempted")

    def _queue(self, sequence: Sequence) -> None:
        if sequence.behind:
            self.held[sequence] = None
        else:
            self._insert(self.waiting, sequence)
            self.waiting_changed = True

    def _insert(self, queue: SequenceQueue, sequence: Sequence) -> None:
        """Put a sequence into a queue of its state, in the order of that."""
        try:
            queue.add(sequence, self._ranking.rank(sequence))
        except Exception as error:  # of its own place, or beside another's
            self.fail(sequence, error)

    def take_over(self, broken: "SequenceLifecycle", error: BaseException) -> None:
        """Take the live sequences of another lifecycle, of which only `live` and what is new can be
        relied on, since a turn was broken off by `error`.

        Each sequence goes back to the queue, whatever its state. A sequence that was being given a
        token fails: what comes with that token may be half done.
        """
        self.news = broken.news
        for sequence in [each for choices in broken.live.values() for each in choices]:
            self.news.setdefault(sequence, len(sequence.output))
            if sequence.done:  # only the last lines of its end are missing
                if not self._recorder.has_ended(sequence):
                    self._recorder.mark(sequence, "finished")
                continue
            self.live.setdefault(sequence.request.id, []).append(sequence)
            sequence.found.clear()  # the indices of the broken lifecycle's pools
            self._wait_again(sequence)
            if sequence.settled < len(sequence.output):
                self.fail(sequence, error)

    # At its end.

    def note(self, sequence: Sequence) -> None:
        """There will be news of a sequence."""
        if sequence not in self.news:
            self.news[sequence] = len(sequence.output)

    def fail_all(self, refs: Iterable[SequenceRef], error: BaseException) -> None:
        """End the sequences that `error` concerns, as far as their references are current."""
        for sequence in current(refs):
            self.fail(sequence, error)

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
        """End a sequence, with the reason."""
        sequence.error = reason_of(error)
        self.end(sequence, State.FAILED, "error")

    def shed(self, request_id: str, reason: str) -> None:
        """End all choices of a request, with the reason. Once one of them has begun or ended all
        stay: to shed the others would throw away what it computes."""
        choices = list(self.live.get(request_id, ()))
        if not choices or len(choices) < choices[0].request.params.n:
            return
        if any(each.state is not State.WAITING or each.output for each in choices):
            return
        for sequence in choices:
            sequence.error = reason
            self.end(sequence, State.SHED, "shed")

    def stop(self, sequence: Sequence, tokens: int, stop: str) -> None:
        """End a sequence whose first `tokens` tokens of output have completed a stop string; those
        behind them never were."""
        sequence.stop_reason = stop
        self.end(sequence, State.FINISHED, "stop", tokens)

    def end(
        self, sequence: Sequence, state: State, finish_reason: str, tokens: int | None = None
    ) -> None:
        """End a sequence: it holds nothing any more, and is forgotten once it has been told of. Of
        its output `tokens` tokens stay; None is all of them."""
        self.note(sequence)
        self._release(sequence, sound=state is not State.FAILED)
        if tokens is not None:
            del sequence.output[tokens:], sequence.logprobs[tokens:]
            sequence.settled = len(sequence.output)
            self._recorder.cut(sequence, tokens)
        sequence.finish_reason = finish_reason
        self._move(sequence, state)
        if state is not State.FINISHED and sequence.text is not None:
            with suppress(Exception):  # it may be the text that went wrong
                sequence.text.finish()
        self._recorder.mark(sequence, "finished")
        choices = self.live[sequence.request.id]
        choices.remove(sequence)
        if not choices:
            del self.live[sequence.request.id]

    def _move(self, sequence: Sequence, state: State) -> None:
        before = sequence.state
        sequence.move(state)
        self._recorder.observer.sequence_moved(sequence, before, state)

    def _release(self, sequence: Sequence, *, sound: bool) -> None:
        """Take a sequence from where it is, and let go of what it holds. Steps that were dispatched
        for it may still write to its pages: whatever writes there next is dispatched after them.

        Args:
          sound: whether what it has written is right, so that it may be found.
        """
        if sequence in self._others:
            self._let_others_in(sequence)
        if sequence.handoff is not None:
            sequence.handoff.close()
            sequence.handoff = None
        match sequence.state:
            case State.WAITING if sequence in self.held:
                del self.held[sequence]
            case State.WAITING:
                self.waiting.discard(sequence)
                self.waiting_changed = True
            case State.LOADING:
                del self.loading[sequence]
            case State.PREFILLING:
                state = self.engine_of(sequence)
                state.running.remove(sequence)
                self._fleet.touch(state)
            case State.PREFILLED:
                self.prefilled.discard(sequence)
                self.prefilled_changed = True
            case State.TRANSFERRING:
                pass  # what it held was the hand-off's
            case State.DECODING:
                state = self.engine_of(sequence)
                state.leave_row(sequence)
                state.rows.release(sequence.row)
                if sound:
                    self.computed(sequence, sequence.length - 1)  # all but the newest token
            case other:
                raise AssertionError(f"sequence {sequence.id} has nothing to release in {other}")
        if sequence.pages:
            if sound and sequence.state is not State.PREFILLING:  # else it may not be complete
                self.pool_of(sequence).written(sequence)
            self.pool_of(sequence).allocator.free(sequence.pages)
        sequence.leave()

    # Who holds what.

    def holders(self, pool: PoolState) -> list[Sequence]:
        """The sequences that hold pages of a pool themselves, not by a hand-off."""
        holders = [seq for state in self._fleet.sharing(pool) for seq in state.decoding]
        holders += [seq for state in self._fleet.sharing(pool) for seq in state.running]
        return holders + [seq for seq in self.prefilled if seq.pool == pool.id]

    def holding(self, pool: PoolState, pages: set[int]) -> list[Sequence]:
        """Those of them that hold any of these pages, or copy one."""
        every = self.holders(pool)
        return [x for x in every if x.copied_from in pages or not pages.isdisjoint(x.pages)]
