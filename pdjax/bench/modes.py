"""Ways to serve a model on the same chips: the modes that benchmarks and experiments compare."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from pdjax.config import Config

MIXED_BUDGET = 512
"""Tokens of prompts in a mixed step, where the config that modes are made of does not say."""


@dataclass(frozen=True)
class Mode:
    """A way to serve.

    Attributes:
      name: on command lines and in results.
      says: what it does, for a table or a report.
      of: makes its config of a disaggregated one, on as many chips.
    """

    name: str
    says: str
    of: Callable[[Config], Config]


def mode_config(name: str, base: Config) -> Config:
    """The config of a mode.

    Args:
      name: of `MODES`.
      base: disaggregated: says how many chips there are, and all that the modes have in common, as
        the prefix cache. Its `prefill.mixed_budget` is that of modes with mixed steps.

    Raises:
      ValueError: no such mode, a base that is not disaggregated, or one whose chips the mode cannot
        use.
    """
    if name not in MODES:
        raise ValueError(f"modes={name!r}: allowed are {', '.join(MODES)}")
    if base.colocated or base.shared_devices:
        raise ValueError(
            f"colocated={base.colocated}, shared_devices={base.shared_devices}: must both be False "
            "where modes are compared, as they are made of a disaggregated config"
        )
    return MODES[name].of(base)


def _disaggregated(base: Config) -> Config:
    return replace(base, prefill=replace(base.prefill, mixed_budget=None))


def _conditional(base: Config) -> Config:
    budget = base.prefill.mixed_budget or MIXED_BUDGET
    return replace(
        base,
        flexible="decode",
        prefill=replace(
            base.prefill,
            mixed_budget=budget,
            token_budget=max(base.prefill.token_budget, budget),
        ),
        policies=replace(base.policies, placement="conditional"),
    )


def _dynamic(base: Config) -> Config:
    config = _conditional(base)
    return replace(config, flexible="all", policies=replace(config.policies, roles="balance"))


def _replicas(base: Config, budget: int | None) -> Config:
    """As many engines of both phases as there are chips; each has `decode.rows` rows."""
    tp, chips = base.prefill.tp, base.devices
    if chips % tp:
        raise ValueError(f"prefill.tp={tp}: must divide the {chips} chips, to make replicas of it")
    prefill = replace(
        base.prefill,
        engines=chips // tp,
        mixed_budget=budget,
        token_budget=max(base.prefill.token_budget, budget or 0),
        dispatch_thread=None,
    )
    decode = replace(
        base.decode, engines=chips // tp, stages=1, tp=tp, page_size=None, kv_dtype=None
    )
    return replace(
        base,
        prefill=prefill,
        decode=decode,
        handoff=base.handoff.where_nothing_moves,
        colocated=True,
    )


_ALL = (
    Mode("disaggregated", "prefill and decode on chips of their own", _disaggregated),
    Mode(
        "conditional",
        "as disaggregated, but prompts that are short, or that prefill is late with, are prefilled "
        "beside the rows of decode, within the TPOT that requests ask for",
        _conditional,
    ),
    Mode(
        "dynamic",
        "as conditional, and engines change between prefill and decode as the load of either side "
        "asks for; how many begin with each is as in disaggregated",
        _dynamic,
    ),
    Mode(
        "colocated",
        "replicas of both phases, each of which prefills first: steps of prompts and ticks in turn",
        lambda base: _replicas(base, None),
    ),
    Mode(
        "mixed",
        "replicas of both phases, whose steps mix chunks of prompts and decode rows",
        lambda base: _replicas(base, base.prefill.mixed_budget or MIXED_BUDGET),
    ),
)

MODES = {mode.name: mode for mode in _ALL}
"""All modes, by their names; the line of a new one goes above."""
