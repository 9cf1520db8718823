"""The shapes of steps that are timed alone where a command line names none."""

from dataclasses import dataclass

from pdjax.sim.step_cases import DecodeCase, MixedCase, PrefillCase

__all__ = ["LARGE", "TINY", "DecodeCase", "MixedCase", "PrefillCase", "Usual"]


@dataclass(frozen=True)
class Usual:
    """The default cases where the command line names none, by their names there.

    Attributes:
      paged: cases of paged_attention alone.
      append: cases of append_attention alone.
      attention: cases of prefill_attention alone.
      decode, prefill, mixed: cases of whole steps.
    """

    paged: tuple[str, ...]
    append: tuple[str, ...]
    attention: tuple[str, ...]
    decode: tuple[str, ...]
    prefill: tuple[str, ...]
    mixed: tuple[str, ...]


_PREFILL = ("1x1024", "1x2048", "8x1024", "1x8192", "300+700+1200+1896", "2048@6144")
LARGE = Usual(
    paged=("64x4096", "64x1024", "128x1024", "1x8192"),
    append=("1x1060", "16x1060", "64x1060", "128x1060"),
    attention=_PREFILL,
    decode=("1x1060", "16x1060", "64x1060", "128x1060", "32x8192"),
    prefill=_PREFILL,
    mixed=("64x1060/1x512", "16x1060/1x512", "64x1060/512@1536"),
)
"""Cases for an accelerator of 80 GB."""

TINY = Usual(
    paged=("4x64",),
    append=("2x40",),
    attention=("2x32", "20@12"),
    decode=("4x40",),
    prefill=("2x32", "5+9", "8@24"),
    mixed=("4x40/1x16",),
)
"""Cases for a CPU and the smallest model."""
