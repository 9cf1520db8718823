"""The modes that are compared have the same chips, and what they share of a config."""

from dataclasses import replace

import pytest

from pdjax.bench.modes import MIXED_BUDGET, MODES, mode_config
from pdjax.bench.simulated import cluster_of
from pdjax.config import Config, DecodeConfig, HandoffConfig, KVConfig, PrefillConfig

BASE = Config(
    kv=KVConfig(page_size=64, prefix_cache=True),
    prefill=PrefillConfig(engines=3, tp=2, token_budget=256),
    decode=DecodeConfig(engines=1, stages=2, rows=16),
    handoff=HandoffConfig(layer_groups=4),
)


@pytest.mark.parametrize("name", MODES)
def test_a_mode_has_the_chips_of_its_base_and_can_be_simulated(name: str):
    # Flexible engines decode in one stage.
    base = replace(BASE, decode=DecodeConfig(engines=2, tp=1, rows=16))
    made = mode_config(name, base)
    assert made.devices == base.devices == 8
    assert made.kv == BASE.kv and made.decode.rows == 16
    cluster, _ = cluster_of(made)
    assert cluster.config == made


def test_replicas_are_as_many_as_chips_allow():
    made = mode_config("colocated", BASE)
    assert made.colocated and (made.prefill.engines, made.decode.engines) == (4, 4)
    assert made.prefill.mixed_budget is None
    mixed = mode_config("mixed", BASE)
    assert mixed.prefill.mixed_budget == mixed.prefill.token_budget == MIXED_BUDGET
    own = replace(BASE, prefill=replace(BASE.prefill, mixed_budget=128))
    assert mode_config("mixed", own).prefill.mixed_budget == 128
    assert mode_config("disaggregated", own).prefill.mixed_budget is None
    flexible = replace(own, decode=DecodeConfig(rows=16))
    made = mode_config("conditional", flexible)
    assert (made.flexible, made.policies.placement) == ("decode", "conditional")
    made = mode_config("dynamic", flexible)
    assert (made.flexible, made.policies.placement, made.policies.roles) == (
        *("all", "conditional"),
        "balance",
    )
    assert made.prefill.mixed_budget == 128


@pytest.mark.parametrize(
    ("name", "base", "message"),
    [
        ("best", BASE, "modes='best': allowed are disaggregated, conditional, dynamic, colo"),
        ("mixed", replace(BASE, shared_devices=True), "colocated=False, shared_devices=True"),
        ("conditional", BASE, "flexible='decode': needs decode.stages=1"),
        (
            "mixed",
            replace(BASE, decode=DecodeConfig(engines=1, rows=16)),
            "prefill.tp=2: must divide the 7 chips",
        ),
    ],
)
def test_what_cannot_be_made_is_refused(name: str, base: Config, message: str):
    with pytest.raises(ValueError, match=f"^{message}"):
        mode_config(name, base)
