"""The requests of a session: the events that each one's listener hears, and its answer."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

from pdjax.core.messages import reason_of
from pdjax.core.outputs import Completion, RequestEvent, RequestOutput
from pdjax.entry import Entry, Inbox
from pdjax.host.coordinator import Coordinator
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.sequences.news import Progress
from pdjax.host.sequences.sequence import Sequence

_LOG = logging.getLogger("pdjax")


class Book:
    """The requests that have not ended. All but `add` and the look-ups are called within a turn.

    Args:
      recorder: has the metrics of each sequence.
      abort_soon: called with the id of a request that is to be ended.
      failed: called with what a callback has raised, and whether the thread that drives is to raise
        it.
    """

    def __init__(
        self,
        recorder: Recorder,
        abort_soon: Callable[[str], None],
        failed: Callable[[BaseException, bool], None],
    ) -> None:
        self._recorder, self._abort_soon, self._failed = recorder, abort_soon, failed
        self._entries: dict[str, Entry] = {}
        self._answers: dict[str, RequestOutput] = {}

    def add(self, entry: Entry) -> None:
        """Note a request."""
        self._entries[entry.request.id] = entry

    def get(self, request_id: str) -> Entry | None:
        """A request that has not ended; None for any other."""
        return self._entries.get(request_id)

    @property
    def entries(self) -> list[Entry]:
        """The requests that have not ended, oldest first."""
        return list(self._entries.values())

    def take(self, request_id: str) -> RequestOutput | None:
        """The answer to a request that has ended, handed out once, where no listener has had it."""
        return self._answers.pop(request_id, None)

    def clear_answers(self) -> None:
        """Forget the answers that have not been taken."""
        self._answers.clear()

    def carry_out(self, inbox: Inbox, coordinator: Coordinator) -> None:
        """Queue what has arrived, as far as there is room, and end what is to be stopped or
        aborted."""
        arrivals, stops, aborts = inbox.arrivals, inbox.stops, inbox.aborts
        # An entry leaves the inbox only when it is queued: an interrupt may come between the two.
        while arrivals and coordinator.has_room(len(arrivals[0].sequences)):
            _enqueue(arrivals[0], coordinator)
            arrivals.popleft()
        while stops:
            coordinator.stop(*stops[0])
            stops.popleft()
        while aborts:
            entry = self._entries.get(aborts[0])
            if entry is not None:
                if entry in arrivals:
                    _enqueue(entry, coordinator)
                    arrivals.remove(entry)
                coordinator.abort(entry.request.id)
                self.publish(coordinator.take_news())
                self.finish(entry)
            aborts.popleft()

    def publish(self, news: Iterable[Progress]) -> None:
        """Tell each request's callback what is new."""
        for progress in news:
            entry = self._entries.get(progress.sequence.request.id)
            if entry is None:
                continue
            if progress.finished and entry.ended:
                self.finish(entry)
            elif entry.on_event is not None:
                for event in entry.events_of(progress.sequence):
                    self._tell(entry, event)

    def sweep(self) -> None:
        """Finish every request that has ended: news of a turn that was broken off may be lost."""
        for entry in self.entries:
            if entry.ended:
                self.finish(entry)

    def finish(self, entry: Entry) -> None:
        """Tell what is left to tell of a request, and give it its answer. It leaves the book last,
        since an interrupt may come before."""
        if entry.request.id not in self._entries:
            return
        if entry.answer is None:
            entry.answer = self._answer(entry)
        if entry.on_event is not None:
            events = [*filter(None, map(entry.event_of, entry.sequences))]
            events[-1:] = [replace(event, output=entry.answer) for event in events[-1:]]
            for event in events:
                self._tell(entry, event)
        entry.closed = True
        if entry.listener is not None:
            entry.listener.finished.append(entry)
            entry.listener.event.set()
        elif entry.is_taken:
            self._answers[entry.request.id] = entry.answer
        self._entries.pop(entry.request.id, None)

    def _tell(self, entry: Entry, event: RequestEvent) -> None:
        if entry.on_event is not None:
            try:
                entry.on_event(event)
            except BaseException as error:
                self._callback_failed(entry, error)
        if entry.events is not None and entry.listener is not None:
            entry.listener.event.set()

    def _callback_failed(self, entry: Entry, error: BaseException) -> None:
        """End the request whose callback has raised. The turn goes on for all others."""
        entry.on_event = None
        for sequence in entry.sequences:
            sequence.error = f"{entry.callback}: {reason_of(error)}"
        if entry.answer is None:
            self._abort_soon(entry.request.id)
        else:  # it was the last event
            entry.answer = self._answer(entry)
        meant = entry.is_hit_by(error)
        if not meant:
            _LOG.warning("%s: its %s failed", entry.request.id, entry.callback, exc_info=error)
        self._failed(error, meant)

    def _answer(self, entry: Entry) -> RequestOutput:
        return RequestOutput(
            request_id=entry.request.id,
            prompt=entry.prompt,
            prompt_token_ids=list(entry.request.prompt_token_ids),
            choices=[self._completion(sequence) for sequence in entry.sequences],
            prompt_logprobs=entry.prompt_logprobs,
        )

    def _completion(self, sequence: Sequence) -> Completion:
        return Completion(
            token_ids=list(sequence.output),
            text=sequence.text.text if sequence.text is not None else "",
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            logprobs=(
                None if sequence.request.params.logprobs is None else list(sequence.logprobs)
            ),
            error=sequence.error,
            metrics=self._recorder.request(sequence),
        )


def _enqueue(entry: Entry, coordinator: Coordinator) -> None:
    if not entry.ended and not coordinator.is_live(entry.request.id):
        coordinator.enqueue(entry.sequences)
