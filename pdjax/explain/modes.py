"""The modes of `pdjax/bench/modes.py` on so many chips: each way to split them, each budget."""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from pdjax.bench.modes import MIXED_BUDGET, MODES, mode_config
from pdjax.config import Config
from pdjax.sim.calibration import check_one_chip

GROUPS = 4
"""Layer groups of prefill steps where the config leaves them to the planner, which chooses as many
between GPUs that NVLink joins: see docs/benchmarks.md."""


@dataclass(frozen=True)
class Variant:
    """A mode with so many engines of each phase, and so many tokens of prompts in mixed steps.

    Attributes:
      name: for tables, such as "1P3D" or "4 x mixed 512".
      kind: the mode, by its name in `MODES`.
      config: of its engines.
    """

    name: str
    kind: str
    config: Config

    @property
    def apart(self) -> bool:
        """Whether prefill and decode have chips of their own."""
        return not self.config.colocated


def variants(config: Config, chips: int, budgets: Seq[int], kinds: Seq[str]) -> list[Variant]:
    """The variants of some modes.

    Args:
      config: whose rows, budgets, policies and prefix caches all have.
      chips: of all engines together; an engine has one.
      budgets: tokens of prompts in a mixed step, each a variant of modes with such steps.
      kinds: of `MODES`.

    Raises:
      ValueError: no such mode, no mode, fewer chips than two, engines of several chips.
    """
    if not kinds:
        raise ValueError(f"modes: must be some of {', '.join(MODES)}")
    if chips < 2:
        raise ValueError(f"chips={chips}: must be at least 2, for both phases to have their own")
    check_one_chip(config)
    if any(budget < 1 for budget in budgets):
        raise ValueError(f"budgets={','.join(map(str, budgets))}: must be at least 1 token each")
    found: dict[str, Variant] = {}
    for kind in dict.fromkeys(kinds):
        for base in _bases(config, chips, budgets or [MIXED_BUDGET]):
            made = mode_config(kind, base)
            name = _name(kind, made)
            found.setdefault(name, Variant(name, kind, made))
    return list(found.values())


def _bases(config: Config, chips: int, budgets: Seq[int]) -> Iterator[Config]:
    """What modes are made of: each split of the chips, with each budget."""
    handoff = config.handoff
    if handoff.streaming and handoff.layer_groups is None:
        handoff = replace(handoff, layer_groups=GROUPS)
    for count in range(1, chips):
        for budget in budgets:
            yield replace(
                config,
                colocated=False,
                shared_devices=False,
                handoff=handoff,
                prefill=replace(
                    config.prefill,
                    engines=count,
                    mixed_budget=budget,
                    token_budget=max(config.prefill.token_budget, budget),
                    dispatch_thread=None,
                ),
                decode=replace(config.decode, engines=chips - count),
            )


def _name(kind: str, config: Config) -> str:
    """The engines, then what they do, but for plain disaggregation, which the engines tell."""
    prefill, budget = config.prefill, config.prefill.mixed_budget
    engines = f"{prefill.engines}P{config.decode.engines}D"
    words = [f"{prefill.engines} x {kind}" if config.colocated else engines]
    if not config.colocated and kind != "disaggregated":
        words.append(kind)
    return " ".join(words if budget is None else [*words, str(budget)])
