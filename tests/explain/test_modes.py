"""The modes of a config: what they are called, and that each can be deployed."""

from dataclasses import replace

import pytest

from pdjax.bench.modes import MODES
from pdjax.config import Config, DecodeConfig, HandoffConfig, PrefillConfig
from pdjax.config.presets import PRESETS
from pdjax.explain.modes import variants

LLAMA = PRESETS["llama3_8b"]()


def test_all_splits_and_all_budgets_are_variants():
    made = variants(LLAMA, 4, [512, 1024], ["disaggregated", "colocated", "mixed"])
    names = ["1P3D", "2P2D", "3P1D", "4 x colocated", "4 x mixed 512", "4 x mixed 1024"]
    assert [each.name for each in made] == names
    assert [each.apart for each in made] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("kind", MODES)
def test_every_mode_has_variants_of_as_many_chips(kind: str):
    made = variants(LLAMA, 3, [512], [kind])
    assert made and all(each.config.devices == 3 and each.kind == kind for each in made)
    assert len({each.config for each in made}) == len(made)


def test_what_is_not_of_the_mode_stays_as_the_config_has_it():
    base = replace(LLAMA, decode=replace(LLAMA.decode, rows=32), max_waiting=7)
    for mode in variants(base, 2, [512], list(MODES)):
        assert (mode.config.decode.rows, mode.config.max_waiting) == (32, 7)


def test_a_config_of_any_mode_is_a_start():
    """A colocated config, whose hand-off does nothing, gives the same disaggregated modes."""
    together = Config(colocated=True, prefill=PrefillConfig(mixed_budget=64))
    [apart] = variants(together, 2, [], ["disaggregated"])
    assert (apart.config.colocated, apart.config.prefill.mixed_budget) == (False, None)
    assert apart.config.handoff.layer_groups == 4
    bulk = Config(handoff=HandoffConfig(streaming=False, layer_groups=1))
    [apart] = variants(bulk, 2, [], ["disaggregated"])
    assert apart.config.handoff.streaming is False


def test_a_budget_of_chunks_is_at_most_that_of_a_step():
    [mode] = variants(LLAMA, 2, [4096], ["mixed"])
    assert mode.config.prefill.token_budget == 4096


@pytest.mark.parametrize(
    ("config", "chips", "budgets", "kinds", "message"),
    [
        (LLAMA, 2, [512], ["replicated"], "modes='replicated': allowed are disaggregated"),
        (LLAMA, 2, [512], [], "modes: must be some of disaggregated"),
        (LLAMA, 1, [512], ["mixed"], "chips=1: must be at least 2"),
        (LLAMA, 2, [0], ["mixed"], "budgets=0: must be at least 1 token each"),
        (Config(decode=DecodeConfig(stages=2)), 2, [], ["mixed"], "decode.stages=2: must be 1"),
        (Config(prefill=PrefillConfig(tp=2)), 2, [], ["mixed"], "prefill.tp=2: must be 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(config, chips, budgets, kinds, message: str):
    with pytest.raises(ValueError, match=message):
        variants(config, chips, budgets, kinds)
