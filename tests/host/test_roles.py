"""What engines are given to do: roles at the start."""

import pytest

from pdjax.core.ids import EngineId
from pdjax.core.roles import Role
from pdjax.host.service import services_of
from pdjax.interfaces.steps import StepKind
from tests.helpers.deployment import CONFIG, LAYOUT, Deployment, assemble, expected
from tests.helpers.fake_engines import FakeMixedEngine, FakePrefillEngine
from tests.helpers.fakes import Chance

A, B = EngineId("mixed/0"), EngineId("mixed/1")


def deployed(*roles: Role) -> Deployment:
    """Engines that can do everything, each with a role and a pool of its own."""
    chance = Chance(0)
    engines = [
        FakeMixedEngine(LAYOUT, 40, 2, chance, name=f"mixed/{i}") for i, _ in enumerate(roles)
    ]
    named = {engine.id: role for engine, role in zip(engines, roles, strict=True)}
    return assemble(list(engines), chance, CONFIG, roles=named)


def test_each_engine_is_given_what_its_role_says():
    deployment = deployed(Role.PREFILL, Role.DECODE)
    sequences = [deployment.submit(name, prompt_len=8) for name in "abcd"]
    deployment.run()
    assert [each.output for each in sequences] == [expected(each) for each in sequences]
    assert {each.home for each in sequences} == {A}
    kinds = {
        span.track: {s.name for s in deployment.recorder.spans() if s.track == span.track}
        for span in deployment.recorder.spans()
    }
    assert kinds == {A: {"step"}, B: {"tick"}}


def test_an_engine_without_a_role_does_all_that_it_accepts():
    engines = [FakeMixedEngine(LAYOUT, 40, 2, Chance(0), name=name) for name in (A, B)]
    services = services_of(engines, {B: Role.DECODE})
    assert [services[name].role for name in (A, B)] == [Role.MIXED, Role.DECODE]


def test_a_kind_of_work_that_no_engine_is_given_is_refused():
    with pytest.raises(ValueError, match="roles: no engine is given decode work"):
        deployed(Role.PREFILL, Role.PREFILL)
    with pytest.raises(ValueError, match="roles: no engine is given prefill work"):
        deployed(Role.DECODE)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({EngineId("mixed/7"): Role.PREFILL}, "'mixed/7' is no engine; there are prefill/0"),
        ({EngineId("prefill/0"): Role.MIXED}, "prefill/0 cannot have role mixed"),
        ({EngineId("prefill/0"): Role.DECODE}, "accepts steps of prefill alone"),
    ],
)
def test_roles_that_engines_cannot_have_are_refused(roles, message):
    engine = FakePrefillEngine(LAYOUT, 40, Chance(0))
    with pytest.raises(ValueError, match=message):
        services_of([engine], roles)


def test_what_a_role_includes():
    assert [role for role in Role if role.prefills] == [Role.PREFILL, Role.MIXED]
    assert [role for role in Role if role.decodes] == [Role.DECODE, Role.MIXED]
    assert Role.MIXED.includes(Role.DECODE) and not Role.DECODE.includes(Role.MIXED)
    assert Role.of(prefills=False, decodes=True) is Role.DECODE
    with pytest.raises(ValueError, match="prefills, decodes, or does both"):
        Role.of(prefills=False, decodes=False)
    assert {kind.value for kind in StepKind} == {role.value for role in Role}
