"""The same workload at another speed, of other lengths, or within a context."""

import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import replace

from pdjax.workloads.arrival import Arrival, Piece


def scaled(
    arrivals: Iterable[Arrival], *, time: float = 1.0, prompt: float = 1.0, output: float = 1.0
) -> list[Arrival]:
    """Multiply moments and think times by `time`, and lengths by `prompt` and `output`.

    Lengths are rounded, to at least one token. Each piece of a prompt is scaled by itself, so that
    prompts share as large a part as before.

    Raises:
      ValueError: a factor that is not a number above 0; of time, below 0.
    """
    for name, factor in (("prompt", prompt), ("output", output)):
        if not 0 < factor < math.inf:
            raise ValueError(f"{name}={factor}: must be more than 0")
    if not 0 <= time < math.inf:
        raise ValueError(f"time={time}: must be 0 or more")
    made = []
    for each in arrivals:
        pieces = tuple(Piece(key, max(1, round(length * prompt))) for key, length in each.pieces)
        own = sum(piece.length for piece in pieces) or max(1, round(each.prompt * prompt))
        made.append(
            replace(
                each,
                moment=each.moment * time,
                prompt=own,
                output=max(1, round(each.output * output)),
                pieces=pieces,
            )
        )
    return made


def mean_rate(arrivals: Iterable[Arrival]) -> float | None:
    """Requests a second of those that wait for no other; None of fewer than two moments."""
    moments = [each.moment for each in arrivals if not each.after]
    span = max(moments, default=0.0) - min(moments, default=0.0)
    return (len(moments) - 1) / span if span > 0 else None


def at_rate(arrivals: Seq[Arrival], rate: float) -> list[Arrival]:
    """Stretch time so that so many requests a second arrive, in the mean; think times stay.

    Raises:
      ValueError: a rate that is not above 0, or moments that have none.
    """
    if not 0 < rate < math.inf:
        raise ValueError(f"rate={rate}: must be more than 0 requests a second")
    now = mean_rate(arrivals)
    if now is None:
        raise ValueError("arrivals: have no rate, as all come at one moment")
    return [
        each if each.after else replace(each, moment=each.moment * now / rate) for each in arrivals
    ]


def within(arrivals: Iterable[Arrival], context: int, *, cut: bool = True) -> list[Arrival]:
    """What fits into a context of prompt and output together.

    A prompt that is too long keeps its beginning, for its output to fit; an output that leaves no
    room for a prompt is cut to `context - 1`. A turn for which the conversation before leaves no
    room is left out, with the turns after it.

    Args:
      arrivals: a workload.
      context: tokens.
      cut: False leaves out what does not fit, instead of cutting it.

    Raises:
      ValueError: a context of fewer than two tokens.
    """
    if context < 2:
        raise ValueError(f"context={context}: must be at least 2 tokens")
    kept, ends = list[Arrival](), dict[str, int]()
    for number, each in enumerate(arrivals):
        if each.after and each.after not in ends:
            continue
        before = ends[each.after] if each.continues else 0
        output = min(each.output, context - 1)
        room = context - before - output
        fits = each.prompt <= room and output == each.output
        if room < 1 or not (fits or cut):
            continue
        # Its number may change with what is left out before it, and its id must not.
        name = each.name(number)
        own = each if fits else _shortened(each, min(each.prompt, room), output)
        kept.append(own if own.id else replace(own, id=name))
        ends[name] = before + own.prompt + own.output
    return kept


def _shortened(each: Arrival, prompt: int, output: int) -> Arrival:
    left, pieces = prompt, list[Piece]()
    for key, length in each.pieces:
        if left:
            pieces.append(Piece(key, min(length, left)))
            left -= pieces[-1].length
    return replace(each, prompt=prompt, output=output, pieces=tuple(pieces))
