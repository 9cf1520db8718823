"""Engines of the tiny model that change roles while they serve: tokens stay exact."""

from dataclasses import replace

import pytest

from pdjax import LLM
from pdjax.core.ids import EngineId
from pdjax.core.roles import Role
from pdjax.host.loop import Loop
from tests.helpers.promise import COLD, answers, disaggregated, expected

CHANGES = {
    4: ("prefill/1", Role.DECODE),
    16: ("decode/0", Role.PREFILL),
    40: ("prefill/1", Role.PREFILL),
}
"""By turns of the loop."""


def test_roles_change_while_requests_run(monkeypatch: pytest.MonkeyPatch):
    config = disaggregated(1, 1, 1, groups=1)
    prefill = replace(config.prefill, engines=2, mixed_budget=8)
    decode = replace(config.decode, engines=2)
    config = replace(config, flexible="all", prefill=prefill, decode=decode)
    with LLM(config, COLD) as llm:
        turn, turns = Loop.turn, [0]

        def counted(loop: Loop, events: object) -> bool:
            turns[0] += 1
            if turns[0] in CHANGES:
                name, role = CHANGES[turns[0]]
                llm.coordinator.set_role(EngineId(name), role)
            return turn(loop, events)  # type: ignore[arg-type]

        monkeypatch.setattr(Loop, "turn", counted)
        while turns[0] <= max(CHANGES):
            assert answers(llm) == expected()
        assert answers(llm) == expected()  # and the last engine to change has drained
        assert sum(each.role_changes for each in llm.recorder.duties.values()) == len(CHANGES)
