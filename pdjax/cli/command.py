"""A subcommand of `pdjax`."""

from collections.abc import Callable
from dataclasses import dataclass

from absl import flags


@dataclass(frozen=True)
class Command:
    """A subcommand: what runs, its flags, its help page."""

    main: Callable[[], int | None]
    values: flags.FlagValues
    usage: str
