"""The backend of a server whose engines are in its own process: an AsyncLLM."""

import asyncio
from pathlib import Path
from typing import Any

from pdjax.async_llm import AsyncLLM
from pdjax.host.engines import EngineState
from pdjax.host.kv.pools import PoolState
from pdjax.host.kv.prefix_account import PrefixTotals
from pdjax.host.metrics.recent import recent
from pdjax.serving.backend import Answer, Ask, ServedModel


class AsyncBackend:
    """Serves the model of an AsyncLLM. The coordinator's thread leaves events for the event loop
    and never waits for it.

    Args:
      llm: closed with this.
      name: what clients call the model; None takes the name of the config's `model.source`.
    """

    def __init__(self, llm: AsyncLLM, name: str | None = None) -> None:
        self._llm = llm
        below = llm.llm
        self.model = ServedModel(
            name or _name_of(below.config.model.source),
            below.max_model_len,
            # Nobody reads the KV of the last token.
            min(below.max_model_len, below.coordinator.most_kv + 1),
            below.config.max_waiting,
            below.config.kv.page_size,
        )
        self.tokenizer = below.tokenizer

    async def submit(self, ask: Ask) -> Answer:
        prompt, params = ask.prompt_token_ids, ask.params
        return await self._llm.stream(prompt, params, whole=ask.whole, **ask.options)

    async def report(self) -> dict[str, Any]:
        """Plain values, as they are at this moment: `engines`, `pools`, `tiers`, `links` and
        `transfers` by name, `disk`: of the tier there, None without one, `queue`, `tokens`: of
        prompts that were computed, and of outputs, and `prefills`, by their place. Counts and
        seconds are of the whole run, those of requests' hand-offs as in docs/metrics.md.

        They are read while the coordinator's thread works, so that two of them may be of moments
        some microseconds apart.
        """
        llm = self._llm.llm
        loop, recorder, disk = llm.coordinator.loop, llm.recorder, llm.deployment.disk
        sequences = sum(len(choices) for choices in list(loop.lifecycle.live.values()))
        waiting, work = len(loop.lifecycle.waiting), dict(recorder.engines)
        return {
            "engines": {
                str(state.id): _engine(state)
                | _work(work.get(str(state.id)))
                | recorder.duty_of(state.id).to_json()
                for state in loop.fleet
            },
            "pools": {str(pool.id): _pool(pool) for pool in loop.fleet.pools.values()},
            "tiers": {str(name): each.to_json() for name, each in loop.tiers.totals.items()},
            "disk": None if disk is None else disk.counters().to_json(),
            "queue": {
                "waiting": waiting,
                "running": max(0, sequences - waiting),
                "max_waiting": llm.config.max_waiting,
            },
            "tokens": {
                "prompt": sum(each.sums.get("tokens", 0) for each in work.values()),
                "output": recorder.output_tokens,
            },
            "links": {name: link.to_json() for name, link in list(recorder.links.items())},
            "transfers": recorder.transfers.to_json(),
            "prefills": {"local": recorder.local_prefills, "remote": recorder.remote_prefills},
        }

    async def recent(self) -> list[dict[str, Any]]:
        return await asyncio.to_thread(recent, self._llm.llm.recorder)  # some milliseconds

    async def close(self) -> None:
        await self._llm.close()


def _name_of(source: str) -> str:
    """The name of a model by its source; of a file or folder only its own name, since a path tells
    of the host."""
    return Path(source).name.removesuffix(".gguf") if Path(source).exists() else source


def _engine(state: EngineState) -> dict[str, Any]:
    return {
        "pool": str(state.pool.id),
        "accepts": sorted(kind.value for kind in state.engine.accepts),
        "rows": 0 if state.pipeline is None else state.pipeline.rows,
        "free_rows": state.free_rows,
        "prefilling": len(state.running),
        "decoding": len(state.decoding),
        "steps_in_flight": len(state.in_flight),
        "paused": state.paused,
        "losses": state.losses,
        "role": state.role.value,
        "status": state.service.status.value,
        "cause": state.service.cause,
        "in_service": int(state.service.outage is None),
    }


def _work(metrics: Any) -> dict[str, Any]:
    if metrics is None:
        return {
            "steps": 0,
            "busy_seconds": 0.0,
            "occupancy": None,
            "bubble_share": None,
            "tokens": 0,
        }
    work = metrics.to_json()
    del work["sums"]
    return work


def _pool(pool: PoolState) -> dict[str, Any]:
    pages = pool.allocator
    return {
        "pages": pages.total,
        "free_pages": pages.free_pages,
        "cached_pages": pages.cached_pages,
        "used_pages": pages.used_pages,
        "page_size": pool.layout.page_size,
        "leaving_pages": pool.leaving,
        "pinned_pages": 0 if pool.pins is None else pool.pins.pages,
        "pins": 0 if pool.pins is None else len(pool.pins),
        "pins_made": 0 if pool.pins is None else pool.pins.totals.pinned,
        "pins_refused": 0 if pool.pins is None else pool.pins.totals.refused,
        **(PrefixTotals() if pool.prefixes is None else pool.prefixes.totals).to_json(),
    }
