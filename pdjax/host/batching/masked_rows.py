"""The rows of a decode pipeline that have a mask, and the masks of those in flight."""

import numpy as np

from pdjax.host.batching.sampling_rows import masks_of
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.batches import Masks


class MaskedRows:
    """Rows with a mask, by microbatch and place. What is known of a row's mask is known at its
    launch; it is wanted at the tick at which the row leaves.

    Args:
      microbatches: how many.
    """

    def __init__(self, microbatches: int) -> None:
        self._places: list[set[int]] = [set() for _ in range(microbatches)]
        self._in_flight: list[dict[int, np.ndarray]] = [{} for _ in range(microbatches)]

    def add(self, microbatch: int, i: int) -> None:
        """A row has a mask from now on."""
        self._places[microbatch].add(i)

    def release(self, microbatch: int, i: int) -> None:
        """A row is given up; what was in flight in it is idle."""
        self._places[microbatch].discard(i)
        self._in_flight[microbatch].pop(i, None)

    def of(self, microbatch: int) -> list[int]:
        """The places with a mask in a microbatch, ascending."""
        places = self._places[microbatch]
        return sorted(places) if places else []  # as nearly always, and it is asked every tick

    def launch(self, microbatch: int, i: int, sequence: Sequence) -> None:
        """A row is launched. Where its sequence may choose any token from now on, this is the last
        that is heard of it."""
        if (mask := sequence.mask) is None:
            self._places[microbatch].remove(i)
        else:
            self._in_flight[microbatch][i] = mask

    def leave(self, microbatch: int, places: np.ndarray) -> Masks | None:
        """A microbatch leaves: the masks that its rows were launched with, of the entries in a tick
        that has rows at `places` i32[n], ascending."""
        masks, self._in_flight[microbatch] = self._in_flight[microbatch], {}
        if not masks:
            return None
        return masks_of({int(places.searchsorted(i)): mask for i, mask in masks.items()})
