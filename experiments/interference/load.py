"""The load of `interference`: decoding rows, intruders, and a config with room for both."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from experiments.common.shapes import random_model
from pdjax import Config, load_config
from pdjax.config import DecodeConfig, KVConfig, PrefillConfig

MODES = ("disaggregated", "colocated")

PAGE_SIZE = 64
"""Tokens a page, unless a flag says otherwise; `bench_engine` has the same."""


@dataclass(frozen=True)
class Load:
    """The decoding rows, the intruders, and the length of a phase; see the flags.

    Raises:
      ValueError: a number is too small to measure anything.
    """

    rows: int
    prompt: int
    long: int
    long_output: int
    intruders: int
    spare: int
    steps: int
    warm: int

    def __post_init__(self) -> None:
        # A request for one token has no hand-off.
        least = dict.fromkeys(asdict(self), 1) | {"long_output": 2, "steps": 2}
        for name, value in asdict(self).items():
            if value < least[name]:
                raise ValueError(f"{name}={value}: must be at least {least[name]}")

    @property
    def output(self) -> int:
        """Most tokens of a row: the first, a phase, and those in flight at its end."""
        return 1 + self.warm + self.steps + 32


def make_config(
    model: str, mode: str, load: Load, budget: int, overrides: Mapping[str, str]
) -> Config:
    """Make a config with the buckets that this load needs, and room for all of it at once."""
    page_size = int(overrides.get("kv.page_size", PAGE_SIZE))
    longest = max(load.prompt + load.output, load.long + load.long_output)
    row, context = (-(-n // page_size) for n in (load.prompt + load.output, longest))
    sequences = max(1, min(64, budget // min(load.prompt, load.long)))
    config = Config(
        model=random_model(model, longest),
        kv=KVConfig(page_size=page_size, prefix_cache=False),
        prefill=PrefillConfig(
            pages=1 + (2 + load.intruders) * context,
            token_budget=budget,
            max_sequences=sequences,
            token_buckets=(budget,),
            page_buckets=(max(context, -(-budget // page_size) + sequences),),
        ),
        decode=DecodeConfig(
            rows=load.rows + load.spare,
            # One page more for each: the coordinator keeps it in reserve for a decoding sequence.
            pages=1 + load.rows * (row + 1) + load.spare * (context + 1),
            page_buckets=tuple(sorted({row, context})),
        ),
        cpu_devices=2,  # for both modes: JAX reads the number only once
        max_waiting=max(1024, load.rows + load.intruders),
        warm_up=False,  # no progress bar is needed here
    )
    config = load_config(config, overrides)
    if mode != "colocated":
        return config
    return replace(config, colocated=True, handoff=config.handoff.where_nothing_moves)
