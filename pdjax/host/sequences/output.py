"""What a chosen token brings with it: log-probabilities, text, and perhaps the end."""

from dataclasses import dataclass

from pdjax.core.outputs import TokenLogprobs
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.batches import Sampled


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
    params, text = sequence.request.params, sequence.text
    ends = token in end_token_ids and not params.ignore_eos
    found: Ending | None = None
    if ends or token in params.stop_tokens:
        found = Ending("stop", token)
    else:
        stop = text.push(token) if text is not None else None
        if stop is not None:
            found = Ending("stop", stop)
        elif len(sequence.output) >= sequence.max_new_tokens:
            found = Ending("length")
    if found and text is not None:
        text.finish()
    return found
