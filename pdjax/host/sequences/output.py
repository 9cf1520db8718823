"""A chosen token becomes output: with log-probabilities and text, and perhaps as the last one."""

from collections.abc import Iterable
from dataclasses import dataclass

from pdjax.core.logprobs import TokenLogprobs
from pdjax.host.metrics.recorder import Recorder
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
    """Why `token`, the newest one, is the last; None if it is not. It is added to the text.

    A token that ends the output is the last of its `token_ids`, but no part of its text.

    Args:
      end_token_ids: tokens with which the model itself ends an answer.
    """
    params, text, constraint = sequence.request.params, sequence.text, sequence.constraint
    ends = token in end_token_ids and not params.ignore_eos
    found: Ending | None = None
    if ends or token in params.stop_tokens:
        found = Ending("stop", token)
    else:
        stop = text.push(token) if text is not None else None
        if constraint is not None:
            constraint.push(token)
        if stop is not None:
            found = Ending("stop", stop)
        elif constraint is not None and constraint.complete:
            found = Ending("stop")
        elif len(sequence.output) >= sequence.max_new_tokens:
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
    """

    def __init__(
        self, lifecycle: SequenceLifecycle, recorder: Recorder, end_token_ids: Iterable[int]
    ) -> None:
        self._lifecycle, self._recorder = lifecycle, recorder
        self._end_token_ids = frozenset(end_token_ids)

    def accept(self, rows: Iterable[tuple[int, SequenceRef]], sampled: Sampled) -> list[Sequence]:
        """Append each row's token to its sequence if the reference is current; finish the sequences
        that hit a stop. Returns those that finished.

        All tokens came at one moment. This is the one loop over all sequences of a decode step. An
        error of one, as in the making of its text, fails that one alone.
        """
        tokens, moment = sampled.tokens.tolist(), self._recorder.now()
        finished = []
        for row, ref in rows:
            if not ref.is_current:
                continue
            sequence, token = ref.sequence, tokens[row]
            if token == NOT_FINITE:
                self._lifecycle.fail_not_finite(sequence)
                continue
            try:
                self._lifecycle.note(sequence)
                sequence.output.append(token)
                wanted = sequence.request.params.logprobs
                if wanted is not None:
                    sequence.logprobs.append(logprobs_of(sampled, row, wanted))
                self._recorder.token(sequence, moment)
                end = ending(sequence, token, self._end_token_ids)
                if end is None and sequence.constraint is not None:
                    self._lifecycle.constrain(sequence)
            except Exception as error:
                self._lifecycle.fail(sequence, error)
            else:
                if end is None:
                    sequence.settled += 1
                else:
                    sequence.stop_reason = end.stop_reason
                    self._lifecycle.end(sequence, State.FINISHED, end.finish_reason)
                    finished.append(sequence)
        return finished
