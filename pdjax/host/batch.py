"""Sequences become the padded numpy arrays that go through the door.

A jitted step is compiled once for each shape it meets, so every batch is padded to one of a few
buckets, all of which can be driven once before the first request. Padding and buckets exist only
here. Padding tokens write to the null page, and padding rows are greedy and ask for nothing.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pdjax.config import DecodeConfig, PrefillConfig
from pdjax.config_checks import MOST_TOKENS
from pdjax.engine_api import PrefillBatch, SamplingBatch
from pdjax.kv_layout import NULL_PAGE
from pdjax.request import Sequence

_MOST_ENTRIES = 2**28
"""Numbers of a table with a row a sequence: 1 GB."""
_HOTTEST = float(np.finfo(np.float32).max)
_MOST_K = int(np.iinfo(np.int32).max)
_LEAST_P = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Chunk:
    """The tokens `[start, stop)` of a sequence, to be prefilled in one step."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        """How many."""
        return self.stop - self.start

    @property
    def last(self) -> bool:
        """Whether the sequence is prefilled after it, so that its next token can be chosen."""
        return self.stop == self.sequence.length


@dataclass(frozen=True)
class Buckets:
    """The padded sizes that batches may have, ascending; the last of each holds whatever may come.

    Attributes:
      tokens: T of a prefill step.
      step_pages: Z of a prefill step.
      table_pages: W of a decode page table.
      handoff_spans: spans of a shipment, of `span` tokens.
      sequences: B of a prefill step.
      context: C of a history, tokens.
      page_size: S of the prefill pools.
      table_page_size: S of the decode pools; one of the two divides the other.
    """

    tokens: tuple[int, ...]
    step_pages: tuple[int, ...]
    table_pages: tuple[int, ...]
    handoff_spans: tuple[int, ...]
    sequences: int
    context: int
    page_size: int
    table_page_size: int

    @classmethod
    def of(
        cls,
        prefill: PrefillConfig,
        decode: DecodeConfig,
        page_size: int,
        max_model_len: int,
        table_page_size: int | None = None,
    ) -> "Buckets":
        """The configured buckets, or where there are none, few that waste little.

        Each bucket of a step is a compilation of the whole model, so those are a factor of four
        apart; a hand-off compiles in no time and pays for padding by the byte, so those are a
        factor of two apart.

        Raises:
          ValueError: configured buckets that cannot hold the longest context, or tables of so many
            rows that no host could hold them.
        """
        if max_model_len > MOST_TOKENS:
            raise ValueError(f"model.max_model_len={max_model_len}: must be at most {MOST_TOKENS}")
        table_page_size = table_page_size or page_size
        context, widest = -(-max_model_len // page_size), -(-max_model_len // table_page_size)
        # Enough that a full token budget fits even if every prompt's last page is nearly empty.
        packed = -(-prefill.token_budget // page_size) + prefill.max_sequences
        for name, buckets, pages in (
            ("prefill.page_buckets", prefill.page_buckets, context),
            ("decode.page_buckets", decode.page_buckets, widest),
        ):
            if buckets is not None and buckets[-1] < pages:
                raise ValueError(
                    f"{name}={buckets}: the largest must hold the {pages} pages of "
                    f"model.max_model_len={max_model_len}"
                )
        for name, rows, each in (
            ("prefill.max_sequences", prefill.max_sequences, max_model_len),
            ("decode.rows", decode.rows, max_model_len),
            ("decode.rows", decode.rows, (decode.page_buckets or (widest,))[-1]),
        ):
            if rows * each > _MOST_ENTRIES:
                raise ValueError(
                    f"{name}={rows}: must be at most {_MOST_ENTRIES // each} with "
                    f"model.max_model_len={max_model_len}, since the host and the devices keep "
                    f"tables of {each} numbers a row"
                )
        return cls(
            tokens=prefill.token_buckets or _spread(prefill.token_budget, 16, 4),
            step_pages=prefill.page_buckets or _spread(max(context, packed), 4, 4),
            table_pages=decode.page_buckets or _spread(widest, 4, 4),
            handoff_spans=_spread(min(context, widest), 4, 2),
            sequences=prefill.max_sequences,
            context=max_model_len,
            page_size=page_size,
            table_page_size=table_page_size,
        )

    @property
    def span(self) -> int:
        """Tokens of a span: of the larger page."""
        return max(self.page_size, self.table_page_size)

    def pages_for(self, tokens: int) -> int:
        """Pages of a prefill pool that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    def table_pages_for(self, tokens: int) -> int:
        """Pages of a decode pool that hold `tokens` tokens."""
        return -(-tokens // self.table_page_size)

    def prefill_shapes(self) -> Iterator[tuple[int, int]]:
        """Every (T, Z) that a step may have: so many new tokens need at least their own pages."""
        for fewer, tokens in zip((0, *self.tokens), self.tokens, strict=False):
            for pages in self.step_pages:
                if pages * self.page_size > fewer:
                    yield tokens, pages


def _spread(largest: int, least: int, factor: int) -> tuple[int, ...]:
    """`largest`, and sizes a `factor` apart below it that are at least `least`."""
    sizes = [largest]
    while sizes[-1] // factor >= least:
        sizes.append(-(-sizes[-1] // factor))
    return tuple(reversed(sizes))


def fit(buckets: tuple[int, ...], size: int) -> int:
    """The smallest bucket that holds `size`."""
    place = bisect_left(buckets, size)
    assert place < len(buckets), f"no bucket of {buckets} holds {size}; a plan is too large"
    return buckets[place]


class SamplingRows:
    """How each row of a batch is sampled, kept as the arrays of a SamplingBatch.

    Args:
      rows: how many.
    """

    def __init__(self, rows: int) -> None:
        self._taken: SamplingBatch | None = None  # as the rows are now, if it has been asked for
        self._arrays = {
            "temperature": np.zeros(rows, np.float32),
            "top_k": np.zeros(rows, np.int32),
            "top_p": np.ones(rows, np.float32),
            "min_p": np.zeros(rows, np.float32),
            "presence_penalty": np.zeros(rows, np.float32),
            "frequency_penalty": np.zeros(rows, np.float32),
            "repetition_penalty": np.ones(rows, np.float32),
            "seed": np.zeros(rows, np.uint32),
            "prompt_lens": np.zeros(rows, np.int32),
            "logprobs": np.zeros(rows, np.bool_),
        }

    def fill(self, row: int, sequence: Sequence) -> None:
        """Sample `row` as `sequence` asks."""
        self._taken = None
        params = sequence.request.params
        values: dict[str, Any] = {
            "seed": sequence.seed,
            "prompt_lens": sequence.prompt_len,
            "logprobs": params.logprobs is not None,
            # Legal values beyond the range of the arrays' types mean the same as their bounds.
            "temperature": min(params.temperature, _HOTTEST),
            "top_k": min(params.top_k, _MOST_K),
            "top_p": max(params.top_p, _LEAST_P),
        }
        for name, array in self._arrays.items():
            array[row] = values[name] if name in values else getattr(params, name)

    def clear(self, row: int) -> None:
        """Nobody sits in `row` any more."""
        self._taken = None
        for name, array in self._arrays.items():
            array[row] = 1 if name in ("top_p", "repetition_penalty") else 0

    def take(self) -> SamplingBatch:
        """A copy of the rows; the same object until a row changes, so that an engine may keep what
        it has made of it."""
        if self._taken is None:
            arrays = {name: array.copy() for name, array in self._arrays.items()}
            self._taken = SamplingBatch(**arrays)
        return self._taken


def prefill_batch(chunks: Seq[Chunk], buckets: Buckets) -> PrefillBatch:
    """Pack `chunks` one after another and pad them; see `engine_api.PrefillBatch`."""
    page_size, rows = buckets.page_size, buckets.sequences
    pages_of = [chunk.sequence.pages[: buckets.pages_for(chunk.stop)] for chunk in chunks]
    batch = empty_prefill_batch(
        buckets,
        fit(buckets.tokens, sum(chunk.tokens for chunk in chunks)),
        fit(buckets.step_pages, sum(map(len, pages_of))),
        history=any(chunk.last and chunk.sequence.request.params.penalized for chunk in chunks),
    )
    sampling = SamplingRows(rows)
    token, page = 0, 0
    for b, (chunk, pages) in enumerate(zip(chunks, pages_of, strict=True)):
        sequence, ids = chunk.sequence, chunk.sequence.token_ids
        packed = slice(token, token + chunk.tokens)
        token, page = packed.stop, page + len(pages)
        positions = np.arange(chunk.start, chunk.stop, dtype=np.int32)
        batch.tokens[packed] = ids[chunk.start : chunk.stop]
        batch.positions[packed] = positions
        own_pages = np.array(pages, np.int32)
        batch.slot_mapping[packed] = (
            own_pages[positions // page_size] * page_size + positions % page_size
        )
        batch.kv_pages[page - len(pages) : page] = own_pages
        batch.cu_q_lens[b + 1 :] = token
        batch.cu_pages[b + 1 :] = page
        batch.kv_lens[b] = chunk.stop
        batch.sample_at[b] = token - 1
        if chunk.last:
            sampling.fill(b, sequence)
            if batch.history is not None:
                batch.history[b, : len(ids)] = ids
    return replace(batch, sampling=sampling.take())


def empty_prefill_batch(
    buckets: Buckets, tokens: int, step_pages: int, *, history: bool = False
) -> PrefillBatch:
    """A step of that bucket in which everything is padding."""
    rows = buckets.sequences
    return PrefillBatch(
        tokens=np.zeros(tokens, np.int32),
        positions=np.zeros(tokens, np.int32),
        slot_mapping=np.full(tokens, NULL_PAGE * buckets.page_size, np.int32),
        kv_pages=np.full(step_pages, NULL_PAGE, np.int32),
        cu_pages=np.zeros(rows + 1, np.int32),
        cu_q_lens=np.zeros(rows + 1, np.int32),
        kv_lens=np.zeros(rows, np.int32),
        sample_at=np.zeros(rows, np.int32),
        sampling=SamplingRows(rows).take(),
        history=np.zeros((rows, buckets.context), np.int32) if history else None,
    )


def span_pages(
    holdings: Iterable[tuple[Seq[int], Seq[int]]], page_size: int, buckets: Buckets
) -> np.ndarray:
    """The pages of some spans of several sequences, one after another, padded with the null page to
    a bucket of spans: i32[n].

    Args:
      holdings: of each sequence its pages, in order, and which spans of it are meant.
      page_size: of the pool that the pages are of.
    """
    each = buckets.span // page_size  # pages of a span
    pages: list[int] = []
    for held, spans in holdings:
        for span in spans:
            own = held[span * each : (span + 1) * each]
            pages += [*own, *[NULL_PAGE] * (each - len(own))]
    return _padded(pages, fit(buckets.handoff_spans, len(pages) // each) * each, NULL_PAGE)


def history(token_ids: Seq[int], buckets: Buckets) -> np.ndarray:
    """`token_ids` i32[C], padded with zeros to the longest context."""
    return _padded(token_ids, buckets.context, 0)


def _padded(values: Seq[int], size: int, filler: int) -> np.ndarray:
    array = np.full(size, filler, np.int32)
    array[: len(values)] = values
    return array
