"""A trace played to the production prefix index, allocator, eviction policies and routers, without
a model: pages are counted, not computed."""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np

from experiments.prefix_cache.traces import Prompt
from pdjax.config import PrefillConfig
from pdjax.core.ids import EngineId, PoolId
from pdjax.core.kv_layout import KVLayout
from pdjax.core.request import Request, SamplingParams
from pdjax.host.batching.buckets import Buckets
from pdjax.host.kv.eviction import EvictionOrder
from pdjax.host.kv.pages import PageAllocator
from pdjax.host.kv.pools import PoolState
from pdjax.host.kv.prefix_index import PrefixIndex
from pdjax.host.policies.api import EngineView, Router
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.steps import StepKind
from pdjax.workloads.files import MOONCAKE_BLOCK as BLOCK

_PARAMS = SamplingParams()
_BUDGET = 8192
"""Tokens of a prefill step, by which `prefix_aware` measures how unequal loads are."""


class Lookup(NamedTuple):
    """A prompt as a prefix index sees it: its tokens, and the keys of its pages. A page is a block;
    a block that is partly filled has a page of its own content, as it has an id in the trace."""

    length: int
    keys: list[bytes]

    def found(self, pages: int) -> int:
        """Tokens of the prompt in its first pages."""
        return min(pages * BLOCK, self.length)


def lookups(prompts: Iterable[Prompt]) -> Iterator[Lookup]:
    """Hash prompts as production does. The tokens of a block are all its id."""
    index = PrefixIndex(PageAllocator(2), BLOCK)
    for prompt in prompts:
        tokens = np.repeat(np.array(prompt.blocks, np.int32), BLOCK)
        yield Lookup(prompt.length, index.keys(tokens))


class Cache:
    """The prefix cache of one pool.

    Args:
      layout: of its pages, of `BLOCK` tokens each.
      pages: that it has.
      order: of eviction.
    """

    def __init__(self, layout: KVLayout, pages: int, order: EvictionOrder) -> None:
        pool = PoolState.of(PoolId("hbm/0"), layout, pages + 1, order)
        assert pool.prefixes is not None, "it has an order"
        self.index, self._allocator = pool.prefixes, pool.allocator

    def serve(self, lookup: Lookup) -> int:
        """Take what is there of a prompt, and keep the rest; returns the tokens found.

        Raises:
          OutOfPages: the whole pool is smaller than the prompt.
        """
        keys = lookup.keys
        found = self.index.take(keys, len(keys) * BLOCK)
        pages = found + self._allocator.allocate(len(keys) - len(found))
        self.index.insert(keys, pages, len(keys) * BLOCK)
        self._allocator.free(pages)
        return lookup.found(len(found))


def found_in_one(trace: Iterable[Lookup], cache: Cache) -> list[int]:
    """Tokens found of each prompt in one cache."""
    return [cache.serve(lookup) for lookup in trace]


def found_in_several(trace: Iterable[Lookup], caches: Seq[Cache], router: Router) -> list[int]:
    """The same where each engine has a cache of its own, and a router chooses among them. What an
    engine has to do is what it has computed so far, since no time passes."""
    hits: list[int] = []
    computed = [0] * len(caches)
    buckets = Buckets.of(PrefillConfig(token_budget=_BUDGET), None, BLOCK, _BUDGET)
    for number, lookup in enumerate(trace):
        length = len(lookup.keys) * BLOCK
        asked = Request(str(number), (0,) * length, _PARAMS, 0.0)
        sequence = Sequence(asked, 0, 0, page_keys={BLOCK: lookup.keys})
        views = [
            _view(place, cache, work, buckets)
            for place, (cache, work) in enumerate(zip(caches, computed, strict=True))
        ]
        chosen = views.index(router.prefill_engine(sequence, views))
        found = caches[chosen].serve(lookup)
        computed[chosen] += lookup.length - found
        hits.append(found)
    return hits


def _view(place: int, cache: Cache, computed: int, buckets: Buckets) -> EngineView:
    """An engine, of which a router sees its load and its prefixes."""

    def cached(sequence: Sequence) -> int:
        return cache.index.known_tokens(sequence, sequence.length)

    name = PoolId(f"hbm/prefill-{place}")
    return EngineView(
        engine=EngineId(f"prefill/{place}"),
        pool=name,
        accepts=frozenset({StepKind.PREFILL}),
        buckets=buckets,
        open=True,
        running=(),
        backlog=computed,
        steps=0,
        rows=0,
        free_rows=0,
        free_pages=0,
        total_pages=0,
        rows_of_pool=0,
        cached=cached,
        sources=frozenset({name}),
    )
