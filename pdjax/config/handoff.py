"""How and when KV moves."""

from dataclasses import dataclass

from pdjax.config.checks import (
    MOST_ATTEMPTS,
    MOST_BYTES,
    MOST_ROWS,
    MOST_TOKENS,
    between,
    check_types,
    one_of,
    seconds,
)
from pdjax.core.kv_layout import QUANTISED_DTYPES


@dataclass(frozen=True)
class HandoffConfig:
    """How and when KV moves between pools; see `host/handoff/` and `host/policies/handoff.py`.

    With colocated=True no KV moves. `after_tokens` and `stay_below` then only say which steps,
    prefill or decode, make a token; all other fields must be their defaults.

    Attributes:
      streaming: send KV while its prefill still runs, chunk by chunk and layer group by layer
        group, to pages reserved on the decode side beforehand.
      layer_groups: programs that a prefill step is cut into; the KV of one group travels while the
        next group computes. None lets a planner choose by the times of the link and of a layer,
        measured at the start. 1 where no KV moves (colocated=True) or streaming is off.
      after_tokens: tokens that a sequence generates on the prefill side after its first one, before
        its hand-off.
      stay_below: a sequence with a shorter prompt (tokens) decodes to its end on the engine that
        prefilled it.
      give_back: send the KV of a finished answer back to the prefill side, for the next turn of
        the conversation; needs kv.prefix_cache.
      rebalance: move sequences from full decode engines to others that are not full.
      wire_dtype: type that KV is rounded to in transit, "int8" or "float8_e4m3fn" with a scale a
        token and head; None sends KV unrounded. A decode.kv_dtype of these types still rounds it,
        before it leaves.
      checksums: send a checksum with each page; the receiver compares it before the sequence may
        decode.
      lease: seconds that pages may stay reserved on the decode side before the prefill ends; None
        reserves them without a limit.
      deadline: seconds that an attempt may take, counted from when the prefill has ended and its
        last KV has left; None has no limit.
      retries: times that KV which did not arrive is sent again.
      reprefills: times that a sequence is prefilled again after its hand-off failed for good; then
        the sequence fails.
      max_bytes_in_flight: most bytes in flight at once, over all hand-offs; None has no bound.
    """

    streaming: bool = True
    layer_groups: int | None = None
    after_tokens: int = 0
    stay_below: int = 0
    give_back: bool = False
    rebalance: bool = False
    wire_dtype: str | None = None
    checksums: bool = False
    lease: float | None = 60.0
    deadline: float | None = 60.0
    retries: int = 1
    reprefills: int = 1
    max_bytes_in_flight: int | None = None

    def __post_init__(self) -> None:
        check_types("handoff", self)
        between("handoff", self, 0, MOST_TOKENS, "after_tokens", "stay_below")
        between("handoff", self, 0, MOST_ATTEMPTS, "retries", "reprefills")
        between("handoff", self, 1, MOST_ROWS, "layer_groups")
        between("handoff", self, 1, MOST_BYTES, "max_bytes_in_flight")
        if self.wire_dtype is not None:
            one_of("handoff.wire_dtype", self.wire_dtype, QUANTISED_DTYPES)
        seconds("handoff", self, "lease", "deadline")

    @property
    def where_nothing_moves(self) -> "HandoffConfig":
        """Keep the fields that have an effect with colocated=True; reset the rest to defaults."""
        return HandoffConfig(after_tokens=self.after_tokens, stay_below=self.stay_below)
