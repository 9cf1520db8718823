"""Made-up sequences and views of engines, for policies to decide about."""

from typing import Any

from pdjax.config import DecodeConfig, PrefillConfig
from pdjax.core.ids import EngineId, PoolId
from pdjax.core.request import Request, SamplingParams
from pdjax.core.roles import Role
from pdjax.host.batching.buckets import Buckets
from pdjax.host.policies.api import EngineView, StepPlan
from pdjax.host.sequences.sequence import Sequence
from pdjax.host.step_times import StepTimes
from pdjax.interfaces.steps import StepKind

MODEL_LEN = 64
PREFILL, DECODE = frozenset({StepKind.PREFILL}), frozenset({StepKind.DECODE})
PREFILL_POOL = PoolId("hbm/prefill-0")


def sequence(
    order: int,
    tokens: int,
    new_tokens: int = 1,
    pages: int = 0,
    *,
    arrival: float = 0.0,
    asked: dict[str, Any] | None = None,
    **state: Any,
) -> Sequence:
    """A sequence of a prompt of so many tokens; `asked` are options of its request."""
    state.setdefault("pool", PREFILL_POOL)
    request = Request(f"r{order}", (1,) * tokens, SamplingParams(), arrival, **(asked or {}))
    made = Sequence(request, 0, 0, order=order, max_new_tokens=new_tokens, **state)
    made.pages = list(range(1, pages + 1))
    return made


def prefill_buckets(budget: int = 10, sequences: int = 4, step_pages: int = 16) -> Buckets:
    config = PrefillConfig(token_budget=budget, max_sequences=sequences, page_buckets=(step_pages,))
    return Buckets.of(config, None, page_size=4, max_model_len=MODEL_LEN)


def view(name: str, pool: PoolId, **values: Any) -> EngineView:
    defaults: dict[str, Any] = {
        "open": True,
        "running": (),
        "backlog": 0,
        "steps": 0,
        "rows": 0,
        "free_rows": 0,
        "free_pages": 20,
        "total_pages": 20,
        "rows_of_pool": values.get("rows", 0) - values.get("free_rows", 0),  # no other engine's
        "cached": lambda sequence: 0,
        "sources": frozenset({pool, PREFILL_POOL}),
    }
    return EngineView(engine=EngineId(name), pool=pool, **{**defaults, **values})


def prefill_view(engine: int = 0, *running: Sequence, **changes: Any) -> EngineView:
    pool = changes.pop("pool", PoolId(f"hbm/prefill-{engine}"))
    values: dict[str, Any] = {
        "accepts": PREFILL,
        "role": Role.PREFILL,
        "buckets": prefill_buckets(),
        "running": running,
        **changes,
    }
    return view(f"prefill/{engine}", pool, **values)


def decode_view(engine: int = 0, page_size: int = 4, **changes: Any) -> EngineView:
    pool = changes.pop("pool", PoolId(f"hbm/decode-{engine}"))
    buckets = Buckets.of(None, DecodeConfig(), page_size, MODEL_LEN)
    values: dict[str, Any] = {
        "accepts": DECODE,
        "role": Role.DECODE,
        "buckets": buckets,
        "rows": 4,
        "free_rows": 4,
        **changes,
    }
    return view(f"decode/{engine}", pool, **values)


def flexible_view(engine: int = 0, *running: Sequence, **changes: Any) -> EngineView:
    """Of an engine for decode that accepts all kinds of steps, of mixed ones up to 8 prompt
    tokens."""
    config = PrefillConfig(token_budget=10, mixed_budget=8, page_buckets=(16,))
    values: dict[str, Any] = {
        "accepts": frozenset(StepKind),
        "buckets": Buckets.of(config, DecodeConfig(), page_size=4, max_model_len=MODEL_LEN),
        "running": running,
        "beside_rows": 8,
        **changes,
    }
    return decode_view(engine, **values)


def chunks(plan: StepPlan) -> list[tuple[int, int, int]]:
    return [(chunk.sequence.order, chunk.start, chunk.stop) for chunk in plan.chunks]


def times(base: float, each: float) -> StepTimes:
    """Of an engine whose steps take exactly that."""
    made = StepTimes()
    for size in (1, 2):
        made.add(size, base + each * size)
    return made
