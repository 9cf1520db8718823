"""A chosen token becomes output: with log-probabilities and text, and perhaps as the last one."""

from collections.abc import Iterable
from dataclasses import dataclass

from pdjax.core.logprobs import TokenLogprobs
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.sequences.guide_threads import Advanced, GuideThreads, advanced
from pdjax.host.sequences.lifecycle import SequenceLifecycle
from pdjax.host.sequences.reference import SequenceRef
from pdjax.host.sequences.sequence import Sequence, State
from pdjax.interfaces.batches import NOT_FINITE, Sampled


@dataclass(frozen=True)
class Ending:
    """Why a sequence is complete: "stop" or "length", and what stopped it."""

    finish_reason: str
    stop_reason: str | int | None = None


def logprobs_of(sampled: Sampled, row: int, wanted: int) -> TokenLogprobs:
    """Log-probabilities of the token that was chosen in `row`, and of the `wanted` likeliest."""
    ids, values = sampled.top_ids[row, :wanted], sampled.top_logprobs[row, :wanted]
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(float(sampled.chosen_logprobs[row]), top)


def ending(sequence: Sequence, token: int, end_token_ids: frozenset[int]) -> Ending | None:
    """Why `token`, the newest one, is the last, whatever the sequence's form says; None if it is
    not. It is added to the text.

    A token that ends the output is the last of its `token_ids`, but no part of its text. Whether an
    output with a constraint has come to its length is asked when that has taken the token, since an
    output that is complete stops.

    Args:
      end_token_ids: tokens with which the model itself ends an answer.
    """
    text = sequence.text
    ends = token in end_token_ids and not sequence.request.params.ignore_eos
    found: Ending | None = None
    if ends or token in sequence.stop_token_ids:
        found = Ending("stop", token)
    else:
        stop = text.push(token) if text is not None else None
        if stop is not None:
            found = Ending("stop", stop)
        elif sequence.constraint is None and len(sequence.output) >= sequence.max_new_tokens:
            found = Ending("length")
    if found and text is not None:
        text.finish()
    return found


class OutputProcessor:
    """Gives sequences their tokens.

    Args:
      lifecycle: ends sequences.
      recorder: is told of each token.
      end_token_ids: tokens with which the model ends an answer.
      guides: follow the guides of sequences; without them that is done at once.
    """

    def __init__(
        self,
        lifecycle: SequenceLifecycle,
        recorder: Recorder,
        end_token_ids: Iterable[int],
        guides: GuideThreads | None = None,
    ) -> None:
        self._lifecycle, self._recorder, self._guides = lifecycle, recorder, guides
        self._end_token_ids = frozenset(end_token_ids)

    def accept(self, rows: Iterable[tuple[int, SequenceRef]], sampled: Sampled) -> list[Sequence]:
        """Append each row's token to its sequence if the reference is current; finish the sequences
        that hit a stop. Returns those that finished.

        All tokens came at one moment. This is the one loop over all sequences of a decode step. An
        error of one, as in the making of its text, fails that one alone.
        """
        tokens, moment = sampled.tokens.tolist(), self._recorder.now()
        news, record, ends = self._lifecycle.news, self._recorder.token, self._end_token_ids
        finished = []
        for row, ref in rows:
            if not ref.is_current:
                continue
            sequence, token, end = ref.sequence, tokens[row], None
            if token == NOT_FINITE:
                self._lifecycle.fail_not_finite(sequence)
                continue
            try:
                output = sequence.output
                if sequence not in news:
                    news[sequence] = len(output)
                output.append(token)
                if sequence.wanted_logprobs is not None:
                    sequence.logprobs.append(logprobs_of(sampled, row, sequence.wanted_logprobs))
                record(sequence, moment)
                if (
                    len(output) >= sequence.max_new_tokens
                    or token in ends
                    or token in sequence.stop_token_ids
                    or sequence.text is not None
                ):  # else nothing ends it
                    end = ending(sequence, token, ends)
                if end is None and sequence.constraint is not None:
                    end = self._constrain(sequence)
            except Exception as error:
                self._lifecycle.fail(sequence, error)
            else:
                if end is None:
                    sequence.settled += 1
                else:
                    self._finish(sequence, end)
                    finished.append(sequence)
        return finished

    def _constrain(self, sequence: Sequence) -> Ending | None:
        """Work out which tokens may follow the newest one, or let a thread do it; returns why none
        does."""
        constraint = sequence.constraint
        assert constraint is not None, f"{sequence.id} may choose any token"
        if self._guides is not None and constraint.guided:
            constraint.behind = True
            self._guides.advance(sequence)
            return None
        return self._after(Advanced(sequence, advanced(sequence)))

    def take(self, done: Advanced) -> bool:
        """A thread has worked out which tokens may follow. Returns whether the sequence has
        finished."""
        sequence = done.sequence
        if sequence.done:
            return False
        try:
            end = self._after(done)
        except Exception as error:
            self._lifecycle.fail(sequence, error)
            return False
        if end is not None:
            self._finish(sequence, end)
        return end is not None

    def _after(self, done: Advanced) -> Ending | None:
        """Let a sequence go on whose constraint has taken its newest token, or say why it ends."""
        sequence, error = done
        constraint, end = sequence.constraint, None
        assert constraint is not None, f"{sequence.id} may choose any token"
        constraint.behind = False
        if error is not None:
            raise error
        if constraint.complete:
            end = Ending("stop")
        elif sequence.tokens_left <= 0:
            end = Ending("length")
        else:
            self._lifecycle.go_on(sequence)
        if end is not None and sequence.text is not None:
            sequence.text.finish()
        return end

    def _finish(self, sequence: Sequence, end: Ending) -> None:
        sequence.stop_reason = end.stop_reason
        self._lifecycle.end(sequence, State.FINISHED, end.finish_reason)
