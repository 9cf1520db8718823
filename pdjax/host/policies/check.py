"""What is wrong with the answer of a policy, before anything of it is carried out.

Policies are written by users. So first the types of an answer are checked, all the way down to
fields that are used: a wrong one is named with its place in the answer, its value and what is
allowed. Then comes what the values mean.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pdjax.core.ids import EngineId
from pdjax.core.messages import shown
from pdjax.host.batching.chunks import Chunk
from pdjax.host.policies.api import (
    Admission,
    AskAgain,
    EngineView,
    GiveBack,
    GrowthPlan,
    HandoffPolicy,
    Migration,
    PlacementPolicy,
    Reservation,
    Router,
    Shed,
    ShedCause,
    StepPlan,
)
from pdjax.host.policies.role_api import RoleChange, RoleView
from pdjax.host.sequences.queue import SequenceQueue
from pdjax.host.sequences.sequence import Sequence, State


class BadPlan(RuntimeError):
    """A policy has given an answer that cannot be carried out; nothing of it has been."""


def _fields(kind: type) -> dict[str, tuple[type, ...]]:
    """The types allowed of each field of a dataclass, without those of the elements of a tuple."""
    allowed: dict[str, tuple[type, ...]] = {}
    for name, hint in get_type_hints(kind).items():
        found = getattr(hint, "__supertype__", None) or get_origin(hint) or hint
        found = str if found is Literal else found  # which of them is checked where it is used
        allowed[name] = (int, float) if found is float else (found,)
    return allowed


_PLANS: tuple[type, ...] = (
    *(StepPlan, AskAgain, Chunk, Admission, Migration, GrowthPlan, Reservation, Shed, RoleChange),
)
_FIELDS = {**{kind: _fields(kind) for kind in _PLANS}, Sequence: {}}
"""The types of which a policy makes its answers, and those of their fields."""


def check_steps(
    policy: Any, plans: Seq[StepPlan | AskAgain], views: Seq[EngineView], now: float
) -> None:
    """Refuse prefill steps of engines that are not open, that are too large, that compute tokens in
    another order than they come in, or that admit more than the pool has room for; and moments that
    do not come.

    Raises:
      BadPlan: naming the policy, the plan and what is wrong.
    """
    _check_each(policy, "plan", plans, StepPlan, AskAgain)
    by_name = {view.engine: view for view in views}
    taken: Counter[Any] = Counter()
    twice: set[int] = set()
    for index, plan in enumerate(plans):
        if isinstance(plan, AskAgain):
            if not now < plan.at < math.inf:
                allowed = f"a moment after now, which is {now}"
                raise _wrong(policy, f"plan[{index}].at", plan.at, allowed)
            continue
        _check_each(policy, f"plan[{index}].chunks", plan.chunks, Chunk)
        view = by_name.get(plan.engine)
        if view is None or not view.open:
            raise _bad(policy, plan, f"engine {plan.engine} does not take a prefill step now")
        del by_name[plan.engine]
        _check_size(policy, plan, view)
        for chunk in plan.chunks:
            if id(chunk.sequence) in twice:
                raise _bad(policy, plan, f"sequence {chunk.sequence.id} is in two chunks")
            twice.add(id(chunk.sequence))
            taken[view.pool] += _check_chunk(policy, plan, chunk, view)
        if taken[view.pool] > view.free_pages:
            raise _bad(
                policy,
                plan,
                f"the sequences that it admits need {taken[view.pool]} pages of pool {view.pool}, "
                f"of which {view.free_pages} are free",
            )


def _check_size(policy: Any, plan: StepPlan, view: EngineView) -> None:
    buckets = view.buckets
    tokens = sum(chunk.tokens for chunk in plan.chunks)
    pages = sum(buckets.pages_for(chunk.stop) for chunk in plan.chunks)
    max_tokens = buckets.tokens[-1] if view.beside_rows is None else view.beside_rows
    for what, size, most in (
        ("tokens", tokens, max_tokens),
        ("sequences", len(plan.chunks), buckets.sequences),
        ("pages to read", pages, buckets.step_pages[-1]),
    ):
        if size > most:
            raise _bad(policy, plan, f"{size} {what}; a step has at most {most}")


def _check_chunk(policy: Any, plan: StepPlan, chunk: Chunk, view: EngineView) -> int:
    """Returns the pages that the chunk's sequence has to be given."""
    sequence, admitted = chunk.sequence, 0
    if sequence.state is State.WAITING:
        start, admitted = view.cached(sequence), view.buckets.pages_for(sequence.length)
        begins = chunk.start == start or chunk.start in range(0, start, view.buckets.page_size)
        expected = f"at a page boundary up to {start}, of which the KV is cached, or there"
    elif sequence.state is State.PREFILLING and sequence.engine == view.engine:
        begins, expected = chunk.start == sequence.prefilled, f"at {sequence.prefilled}"
    else:
        raise _bad(
            policy,
            plan,
            f"sequence {sequence.id} is {sequence.state.value} and neither waits nor is prefilled "
            f"by {view.engine}",
        )
    if not begins or not chunk.start < chunk.stop <= sequence.length:
        raise _bad(
            policy,
            plan,
            f"tokens {chunk.start} to {chunk.stop} of sequence {sequence.id}: must begin "
            f"{expected} and end by {sequence.length}",
        )
    return admitted


def check_admissions(
    policy: Any,
    plan: Seq[Admission] | Seq[Migration],
    sequences: Iterable[Sequence],
    views: Iterable[EngineView],
    kind: type[Admission | Migration] = Admission,
) -> None:
    """Refuse admissions and migrations of other sequences than those given, to other engines, or
    without a row.

    Args:
      kind: of which the plan is a list.

    Raises:
      BadPlan: as for `check_steps`.
    """
    _check_each(policy, "plan", plan, kind)
    if not plan:
        return
    known = {id(sequence) for sequence in sequences}
    by_name = {view.engine: view for view in views}
    rows: Counter[EngineId] = Counter()
    for each in plan:
        view, sequence = by_name.get(each.engine), each.sequence
        if id(sequence) not in known:
            what = f"sequence {sequence.id} is not one of those asked about, or comes twice"
            raise _bad(policy, each, what)
        known.remove(id(sequence))
        if view is None:
            raise _bad(policy, each, f"engine {each.engine}: allowed are {_names(by_name)}")
        if sequence.pool not in view.sources:
            raise _bad(policy, each, f"no KV comes from pool {sequence.pool} to {view.pool}")
        if isinstance(each, Migration) and sequence.pool == view.pool:
            raise _bad(policy, each, f"its KV is in pool {view.pool} already")
        rows[each.engine] += 1
        if rows[each.engine] > view.free_rows:
            raise _bad(policy, each, f"engine {each.engine} has {view.free_rows} free rows")


def check_growth(
    policy: Any, plan: GrowthPlan, needing: Seq[Sequence], holders: Seq[Sequence], free: int
) -> None:
    """Refuse victims that hold nothing, pages for sequences that need none, and a plan that does
    not help: each sequence that needs a page gets one or is a victim, and there are as many pages.

    Raises:
      BadPlan: as for `check_steps`.
    """
    _check_type(policy, "plan", plan, GrowthPlan)
    victims, grown = ({id(sequence) for sequence in each} for each in (plan.victims, plan.grown))
    wanting = {id(sequence) for sequence in needing}
    once = len(plan.grown) == len(grown) and len(plan.victims) == len(victims)
    if not victims and grown == wanting and once and len(grown) <= free:
        return  # nearly always
    _check_each(policy, "plan.victims", plan.victims, Sequence)
    _check_each(policy, "plan.grown", plan.grown, Sequence)
    if not once:
        raise _bad(policy, plan, "a sequence is in it twice")
    known = {id(sequence) for sequence in holders}
    strangers = [seq.id for seq in plan.victims if id(seq) not in known]
    if strangers:
        raise _bad(policy, plan, f"victims {shown(strangers)} hold no pages of the pool")
    served = [seq.id for seq in plan.grown if id(seq) not in wanting]
    if served:
        raise _bad(policy, plan, f"sequences {shown(served)} need no page now")
    left = [seq.id for seq in needing if id(seq) not in victims and id(seq) not in grown]
    if left:
        raise _bad(policy, plan, f"sequences {shown(left)} get no page and do not give way")
    pages = free + sum(len(sequence.pages) for sequence in plan.victims)
    if len(plan.grown) > pages:
        raise _bad(policy, plan, f"{len(plan.grown)} sequences grow, but {pages} pages are there")


def check_withdrawals(
    policy: Any, plan: Seq[Reservation], known: Mapping[Reservation, Any]
) -> None:
    """Refuse reservations that do not exist, or are given up twice.

    Raises:
      BadPlan: as for `check_steps`.
    """
    _check_each(policy, "plan", plan, Reservation)
    left = set(known)
    for each in plan:
        if each not in left:
            raise _bad(policy, each, "is not one of the reservations asked about, or comes twice")
        left.remove(each)


def check_shed(policy: Any, plan: Seq[Shed | AskAgain], waiting: SequenceQueue, now: float) -> None:
    """Refuse to shed what does not wait, or has written something; and moments that do not come.

    Raises:
      BadPlan: as for `check_steps`.
    """
    _check_each(policy, "shed", plan, Shed, AskAgain)
    named = Counter(id(each.sequence) for each in plan if isinstance(each, Shed))
    for index, each in enumerate(plan):
        if isinstance(each, AskAgain):
            if not now < each.at < math.inf:
                allowed = f"a moment after now, which is {now}"
                raise _wrong(policy, f"shed[{index}].at", each.at, allowed)
            continue
        if each.cause not in get_args(ShedCause):
            allowed = f"one of {', '.join(get_args(ShedCause))}"
            raise _wrong(policy, f"shed[{index}].cause", each.cause, allowed)
        if each.sequence not in waiting or each.sequence.output or named[id(each.sequence)] > 1:
            what = "does not wait, has written something, or comes twice"
            raise _bad(policy, each, f"sequence {each.sequence.id} {what}")


def check_roles(policy: Any, plan: Seq[RoleChange], views: Seq[RoleView]) -> None:
    """Refuse changes of other engines than those in service, to roles that they may not have now,
    and of more than one engine.

    Raises:
      BadPlan: as for `check_steps`.
    """
    _check_each(policy, "change", plan, RoleChange)
    options = {view.engine: view.options for view in views}
    for each in plan:
        if len(plan) > 1 or each.role not in options.get(each.engine, ()):
            changes = ", ".join(f"{each.engine} to {each.role.value}" for each in plan)
            roles = {name: sorted(role.value for role in its) for name, its in options.items()}
            raise _wrong(policy, "change", changes, f"one engine to one of its options, {roles}")


def agrees(
    policy: HandoffPolicy,
    method: Literal["stays", "streams", "gives_back"],
    about: Sequence | GiveBack,
) -> bool:
    """Ask a policy something about a sequence that it can only affirm or deny.

    Raises:
      BadPlan: the answer is neither True nor False.
    """
    answer = getattr(policy, method)(about)
    if not isinstance(answer, bool):
        sequence = about.sequence if isinstance(about, GiveBack) else about
        raise _wrong(policy, f"{method} of {sequence.id}", answer, "True or False")
    return answer


def choose(
    router: Router,
    method: Literal["prefill_engine", "decode_engine"],
    sequence: Sequence,
    engines: Seq[EngineView],
) -> EngineView:
    """Ask a router for the engine of a sequence.

    Raises:
      BadPlan: the answer is none of `engines`.
    """
    view = getattr(router, method)(sequence, engines)
    if not isinstance(view, EngineView) or all(view.engine != each.engine for each in engines):
        allowed = f"the view of one of {_names(each.engine for each in engines)}"
        raise _wrong(router, f"{method} of {sequence.id}", view, allowed)
    return view


def placed(
    policy: PlacementPolicy, sequence: Sequence, engines: Seq[EngineView], now: float
) -> set[EngineId]:
    """Ask a placement policy for the engines that may prefill a sequence.

    Raises:
      BadPlan: the answer has something else than some of `engines`.
    """
    views = policy.engines_for(sequence, engines, now)
    known = {view.engine for view in engines}
    if not isinstance(views, (list, tuple)) or any(
        not isinstance(view, EngineView) or view.engine not in known for view in views
    ):
        allowed = f"a list or tuple of the views of some of {_names(known)}"
        raise _wrong(policy, f"engines_for of {sequence.id}", views, allowed)
    return {view.engine for view in views}


def mixed_tokens_of(policy: PlacementPolicy, view: EngineView) -> int:
    """Ask a placement policy how many prompt tokens may join the rows of an engine.

    Raises:
      BadPlan: the answer is no number of tokens that a mixed step may have.
    """
    tokens, most = policy.mixed_tokens(view), view.buckets.most_mixed
    if type(tokens) is not int or not 0 <= tokens <= most:
        allowed = f"a whole number from 0 to {most}"
        raise _wrong(policy, f"mixed_tokens of {view.engine}", tokens, allowed)
    return tokens


def rank_of(policy: Any, sequence: Sequence) -> Any:
    """Ask a `Ranked` policy for the place of a sequence in its queue.

    Raises:
      BadPlan: the answer is neither a number nor a tuple of numbers.
    """
    rank = policy.rank(sequence)
    for value in rank if isinstance(rank, tuple) else (rank,):
        if not isinstance(value, int | float) or value != value:
            allowed = "a number or a tuple of numbers"
            raise _wrong(policy, f"rank of {sequence.id}", rank, allowed)
    return rank


def _check_each(policy: Any, where: str, values: Any, *kinds: type) -> None:
    """Refuse what is no list or tuple of objects of some kinds."""
    if not isinstance(values, (list, tuple)):
        raise _wrong(policy, where, values, f"a list or tuple of {_or(kinds)}")
    for index, value in enumerate(values):
        _check_type(policy, f"{where}[{index}]", value, *kinds)


def _check_type(policy: Any, where: str, value: Any, *kinds: type) -> None:
    """Refuse what is not of one of the kinds, or has a field of a wrong type."""
    kind = next((kind for kind in kinds if isinstance(value, kind)), None)
    if kind is None:
        raise _wrong(policy, where, value, f"of type {_or(kinds)}")
    for name, allowed in _FIELDS[kind].items():
        field = getattr(value, name, None)
        if not isinstance(field, allowed):
            raise _wrong(policy, f"{where}.{name}", field, f"of type {_or(allowed)}")


def _or(kinds: Iterable[type]) -> str:
    return " or ".join(kind.__name__ for kind in kinds)


def _wrong(policy: Any, where: str, value: Any, allowed: str) -> BadPlan:
    if isinstance(value, EngineView):
        what = f"view of {shown(value.engine)}"
    else:  # the text of sequences would be long
        what = type(value).__name__ if isinstance(value, tuple(_FIELDS)) else shown(value)
    return BadPlan(f"policy {type(policy).__name__}: {where}={what}: must be {allowed}")


def _names(names: Iterable[Any]) -> str:
    return ", ".join(map(str, names)) or "none"


def _bad(policy: Any, plan: Any, what: str) -> BadPlan:
    return BadPlan(f"policy {type(policy).__name__}: {_shown(plan)}: {what}")


def _shown(plan: Any) -> str:
    """A plan in few words: the sequences and engines, and none of their tokens."""
    match plan:
        case StepPlan():
            chunks = [f"{each.sequence.id}[{each.start}:{each.stop}]" for each in plan.chunks]
            return f"step of {plan.engine} with {shown(chunks)}"
        case Admission() | Migration():
            return f"{type(plan).__name__.lower()} of {plan.sequence.id} to {plan.engine}"
        case GrowthPlan():
            victims, grown = ([seq.id for seq in each] for each in (plan.victims, plan.grown))
            return f"growth of {shown(grown)} with victims {shown(victims)}"
        case Shed():
            return f"shedding of {plan.sequence.id}"
        case Reservation():
            return f"withdrawal of hand-off {plan.handoff}"
        case _:
            return shown(plan)
