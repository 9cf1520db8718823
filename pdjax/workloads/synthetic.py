"""Workloads that are drawn by chance: open and closed loops, conversations, shared prefixes."""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from pdjax.workloads.arrival import Arrival, Piece
from pdjax.workloads.chances import Arrivals, Gaps, Lengths, Mix, Uniform, generator


@dataclass(frozen=True)
class Shape:
    """Lengths of requests: of their prompts, and of what is generated."""

    prompt: Lengths
    output: Lengths


@dataclass(frozen=True)
class ShapeMix:
    """Requests of several shapes, as chats beside summaries.

    Attributes:
      shapes: what there is.
      weights: how likely each is, in any unit.

    Raises:
      ValueError: not one positive weight for each shape.
    """

    shapes: Seq[Shape]
    weights: Seq[float]

    def __post_init__(self) -> None:
        Mix([shape.prompt for shape in self.shapes], self.weights)


def _lengths(shape: Shape | ShapeMix, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of prompts and of outputs, i64[count] each."""
    if isinstance(shape, ShapeMix):
        each = [_lengths(one, count, seed) for one in shape.shapes]
        kinds = Mix([one.prompt for one in shape.shapes], shape.weights)
        chosen = kinds.chosen(generator(seed, "shapes"), count)
        prompts, outputs = (
            np.stack(both)[chosen, range(count)] for both in zip(*each, strict=True)
        )
        return prompts, outputs
    prompts = shape.prompt.draw(generator(seed, "prompts"), count)
    return prompts, shape.output.draw(generator(seed, "outputs"), count)


def _own(seed: int, number: int, length: int) -> tuple[Piece]:
    """A prompt that no other request, and no workload of another seed, shares."""
    return (Piece(f"seed {seed} of {number}", length),)


def open_loop(
    arrivals: Arrivals, shape: Shape | ShapeMix, count: int, seed: int = 0
) -> list[Arrival]:
    """Requests that arrive when they arrive, whatever has become of those before.

    Args:
      arrivals: the process.
      shape: of the requests.
      count: how many.
      seed: of all chance.
    """
    prompts, outputs = _lengths(shape, count, seed)
    moments = arrivals.moments(count, seed)
    rows = zip(moments.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
    return [
        Arrival(moment, prompt, output, pieces=_own(seed, number, prompt))
        for number, (moment, prompt, output) in enumerate(rows)
    ]


def poisson(
    rate: float,
    count: int,
    prompt: tuple[int, int] = (100, 2000),
    output: tuple[int, int] = (20, 200),
    seed: int = 0,
) -> list[Arrival]:
    """Independent arrivals, of lengths that are uniform between bounds, both included.

    Args:
      rate: requests a second.
      count: how many.
      prompt, output: shortest and longest, tokens.
      seed: of all chance.

    Raises:
      ValueError: a rate that is not positive, or lengths below one.
    """
    return open_loop(Arrivals(rate), Shape(Uniform(*prompt), Uniform(*output)), count, seed)


def regular(interval: float, lengths: Iterable[tuple[int, int]]) -> list[Arrival]:
    """Arrivals at equal intervals of seconds, from 0 on, of given (prompt, output) lengths."""
    return [Arrival(i * interval, *both) for i, both in enumerate(lengths)]


def closed_loop(
    clients: int,
    shape: Shape | ShapeMix,
    count: int,
    think: Gaps = Gaps(0.0),  # noqa: B008 - a frozen value
    seed: int = 0,
) -> list[Arrival]:
    """Clients that each ask, wait for the answer, think, and ask again.

    Args:
      clients: how many; each asks its first request at the start.
      shape: of the requests.
      count: requests of all clients; the i-th is asked by client i % clients.
      think: seconds between an answer and the next request of a client.
      seed: of all chance.

    Raises:
      ValueError: no client.
    """
    if clients < 1:
        raise ValueError(f"clients={clients}: must be at least 1")
    prompts, outputs = _lengths(shape, count, seed)
    thinks = think.draw(generator(seed, "thinking"), count)
    return [
        Arrival(
            float(thinks[number]) if number >= clients else 0.0,
            int(prompts[number]),
            int(outputs[number]),
            id=f"r{number}",
            pieces=_own(seed, number, int(prompts[number])),
            after=f"r{number - clients}" if number >= clients else "",
            session=f"client{number % clients}",
            turn=number // clients,
        )
        for number in range(count)
    ]


def conversations(
    arrivals: Arrivals,
    first: Shape,
    later: Shape,
    turns: Lengths,
    count: int,
    think: Gaps,
    seed: int = 0,
) -> list[Arrival]:
    """Sessions of several turns. The prompt of a turn is the conversation so far, with the answers
    as they were given, and new tokens.

    Args:
      arrivals: of sessions.
      first, later: of the first turn, and of each further one, whose prompts are the new tokens.
      turns: of a session.
      count: sessions.
      think: seconds between an answer and the next turn.
      seed: of all chance.
    """
    moments = arrivals.moments(count, seed)
    lasts = turns.draw(generator(seed, "turns"), count)
    whole = int(lasts.sum())
    opened = _lengths(first, count, seed)
    went_on = _lengths(later, whole, seed + 1)
    thinks = think.draw(generator(seed, "thinking"), whole)
    made: list[Arrival] = []
    for session in range(count):
        name, before = f"s{session}", ""
        for turn in range(int(lasts[session])):
            number = len(made)
            lengths, at = (went_on, number) if turn else (opened, session)
            prompt, output = int(lengths[0][at]), int(lengths[1][at])
            arrival = Arrival(
                float(thinks[number] if turn else moments[session]),
                prompt,
                output,
                id=f"{name}t{turn}",
                pieces=_own(seed, number, prompt),
                after=before,
                continues=turn > 0,
                session=name,
                turn=turn,
            )
            made.append(arrival)
            before = arrival.id
    return made


def shared_prefixes(
    arrivals: Arrivals,
    prefix: Lengths,
    shape: Shape | ShapeMix,
    count: int,
    groups: int,
    share: float = 1.0,
    seed: int = 0,
) -> list[Arrival]:
    """Requests of which many begin alike, as with system prompts.

    Args:
      arrivals: the process.
      prefix: of each group, once for all of its requests.
      shape: of what is the requests' own, behind the prefix.
      count: how many requests.
      groups: prefixes; each request that has one has any of them as likely.
      share: of the requests that have a prefix, in [0, 1].
      seed: of all chance.

    Raises:
      ValueError: no group, or a share out of range.
    """
    if groups < 1:
        raise ValueError(f"groups={groups}: must be at least 1")
    if not 0 <= share <= 1:
        raise ValueError(f"share={share}: must be in [0, 1]")
    lengths = prefix.draw(generator(seed, "prefixes"), groups).tolist()
    chance = generator(seed, "groups")
    chosen, begins = chance.integers(0, groups, count), chance.random(count) < share
    made = []
    for number, each in enumerate(open_loop(arrivals, shape, count, seed)):
        group = int(chosen[number])
        head = (Piece(f"seed {seed} prefix {group}", lengths[group]),) if begins[number] else ()
        pieces = (*head, *each.pieces)
        prompt = sum(piece.length for piece in pieces)
        made.append(Arrival(each.moment, prompt, each.output, pieces=pieces))
    return made
