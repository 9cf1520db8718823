"""Engines of fake pools; see tests/helpers/fakes.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from pdjax.core.ids import EngineId, PoolId
from pdjax.core.kv_layout import NULL_PAGE, KVLayout
from pdjax.interfaces.batches import (
    IDLE_ROW,
    USE_FED_BACK,
    DecodeBatch,
    PrefillBatch,
    Sampled,
    joined,
)
from pdjax.interfaces.steps import DecodeStep, MixedStep, PrefillStep, Step, StepKind
from pdjax.interfaces.transport import TransferJob, TransferTicket
from tests.helpers.fakes import (
    DELETED,
    Chance,
    FakePool,
    FakeStepTicket,
    FakeTicket,
    sample,
    sampled,
    scores,
)


class Sender(Protocol):
    """What an engine hands its exports to: `fake_transport.FakeTransport`."""

    def send(self, job: TransferJob) -> TransferTicket:
        """See `interfaces.transport.Transport`."""
        ...


class FakeEngine:
    """What engines of both kinds have.

    Args:
      name: such as "prefill/0".
      pages: a pool that it shares; None makes one of `num_pages`.
    """

    accepts: frozenset[StepKind] = frozenset()

    def __init__(
        self,
        name: str,
        layout: KVLayout,
        num_pages: int,
        chance: Chance,
        *,
        pages: FakePool | None = None,
    ) -> None:
        self.id = EngineId(name)
        self.layout = layout
        self.pages = pages or FakePool(PoolId(f"hbm/{name.replace('/', '-')}"), layout, num_pages)
        self.pool, self.num_pages = self.pages.id, self.pages.num_pages
        self.rows = 0
        self.layer_groups: tuple[range, ...] = (range(layout.num_layers),)
        self.transport: Sender | None = None
        self._chance = chance

    @property
    def losses(self) -> int:
        return self.pages.losses

    def compile(self, step: Step) -> FakeTicket[None]:
        return FakeTicket(None, Chance(0))

    def submit(self, step: Step) -> FakeStepTicket:
        raise NotImplementedError

    def feed(self, row: int, step: Any, index: int) -> None:
        raise AssertionError(f"{self.id} has no rows")

    def set_history(self, row: int, token_ids: np.ndarray) -> None:
        raise AssertionError(f"{self.id} has no rows")

    def close(self) -> None:
        """There is nothing to let go."""


class FakePrefillEngine(FakeEngine):
    """Prefills as soon as it is asked to; only the ticket takes its time."""

    accepts = frozenset({StepKind.PREFILL})

    def __init__(
        self,
        layout: KVLayout,
        num_pages: int,
        chance: Chance,
        layer_groups: tuple[range, ...] | None = None,
        *,
        name: str = "prefill/0",
        pages: FakePool | None = None,
    ) -> None:
        super().__init__(name, layout, num_pages, chance, pages=pages)
        self.layer_groups = layer_groups or self.layer_groups
        self.shapes: set[tuple[int, int]] = set()

    def submit(self, step: Step) -> FakeStepTicket:
        assert isinstance(step, PrefillStep), step
        self._chance.maybe_fail("prefill")
        batch, exports = step.batch, dict[int, TransferTicket]()
        self.shapes.add(self.shape(batch))
        slots = list(zip(batch.tokens.tolist(), batch.slot_mapping.tolist(), strict=True))
        assert len(step.exports) in (0, len(self.layer_groups)), "exports of other layer groups"
        for group, layers in enumerate(self.layer_groups):
            with self.pages.donated(self._chance):
                if not group:
                    self.pages.copy(step.copies)
                for token, slot in slots:
                    self.pages.write(tuple(layers), slot, token)
            for job in step.exports[group] if step.exports else ():
                assert set(job.layers) <= set(layers), "layers that are not computed yet"
                exports[job.id] = self._export(job)
        return FakeStepTicket(self._sampled(batch), self._chance, exports)

    @staticmethod
    def shape(batch: PrefillBatch) -> tuple[int, int]:
        return len(batch.tokens), len(batch.kv_pages)

    def compute(self, batch: PrefillBatch) -> Sampled:
        """A step in one piece, within a donation of the pool."""
        slots = zip(batch.tokens.tolist(), batch.slot_mapping.tolist(), strict=True)
        for token, slot in slots:
            self.pages.write(tuple(range(self.layout.num_layers)), slot, token)
        return self._sampled(batch)

    def _export(self, job: TransferJob) -> TransferTicket:
        """An export that fails fails alone."""
        assert self.transport is not None and job.source == self.pool
        try:
            return self.transport.send(job)
        except BaseException as error:
            return FailedTransfer(error)

    def _sampled(self, batch: PrefillBatch) -> Sampled:
        layers, size = tuple(range(self.layout.num_layers)), self.layout.page_size
        padding = batch.slot_mapping[batch.cu_q_lens[-1] :]
        assert (padding // size == NULL_PAGE).all(), "padding writes to a page of a sequence"
        tokens, contexts = [], list[int]()
        scored = [] if batch.scored is None else batch.scored.at.tolist()
        for b in range(len(batch.kv_lens)):
            first, last = batch.cu_q_lens[b], batch.cu_q_lens[b + 1]
            if first == last:
                tokens.append(self._chance.garbage())
                continue
            length = int(batch.kv_lens[b])
            assert batch.positions[first:last].tolist() == list(
                range(length - (last - first), length)
            )
            assert batch.sample_at[b] == last - 1
            pages = batch.kv_pages[batch.cu_pages[b] : batch.cu_pages[b + 1]]
            history = [] if batch.history is None else batch.history[b, :length].tolist()
            context = self.pages.read(layers, pages, length)
            tokens.append(sample(batch.sampling, batch.masks, b, context, length, history))
            for at in scored:
                if first <= at < last:
                    seen = int(batch.positions[at]) + 1
                    contexts.append(self.pages.read(layers, pages, seen))
        found = None if batch.scored is None else scores(contexts, batch.scored.targets)
        return replace(sampled(tokens), scores=found)


class FailedTransfer:
    """The ticket of a transfer that could not begin."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    @property
    def read(self) -> "FailedTransfer":
        return self

    def ready(self) -> bool:
        return True

    def result(self) -> Any:
        raise self._error


@dataclass
class _Activation:
    """What a row of a microbatch carries from stage to stage."""

    token: int
    context: int = 0


class FakeDecodeEngine(FakeEngine):
    """The tick program, stage by stage: a stage writes and reads its own layers, at its own tick,
    through the page table that it is given for that tick."""

    accepts = frozenset({StepKind.DECODE})

    def __init__(
        self,
        layout: KVLayout,
        num_pages: int,
        rows: int,
        chance: Chance,
        *,
        name: str = "decode/0",
        pages: FakePool | None = None,
    ) -> None:
        super().__init__(name, layout, num_pages, chance, pages=pages)
        self.rows = rows
        self.shapes: set[tuple[int, int]] = set()
        self._rows = rows // layout.stages  # of a microbatch
        self._carried = [[_Activation(0)] * self._rows for _ in range(layout.stages)]
        self._fed_back = [0] * self._rows
        self._history: dict[int, list[int]] = {}
        self._state_losses = 0

    @property
    def losses(self) -> int:
        return self.pages.losses + self._state_losses

    @contextmanager
    def _donated(self) -> Iterator[None]:
        """As with the pool, of what lives from tick to tick."""
        try:
            yield
        except BaseException:
            lost = _Activation(DELETED, DELETED)
            self._carried = [[lost] * self._rows for _ in range(self.layout.stages)]
            self._fed_back, self._history = [DELETED] * self._rows, {}
            self._state_losses += 1
            raise

    def feed(self, row: int, step: Any, index: int) -> None:
        self._chance.maybe_fail("feed")
        with self._donated():
            self._fed_back[row % self._rows] = max(int(step.chosen[index]), 0)
            self._chance.maybe_fail("feed, after donation")

    def set_history(self, row: int, token_ids: np.ndarray) -> None:
        self._chance.maybe_fail("set_history")
        with self._donated():
            self._history[row] = token_ids.tolist()
            self._chance.maybe_fail("set_history, after donation")

    def submit(self, step: Step) -> FakeStepTicket:
        assert isinstance(step, DecodeStep), step
        self._chance.maybe_fail("tick")
        with self._donated(), self.pages.donated(self._chance):
            return FakeStepTicket(self._compute(step.batch), self._chance)

    def _compute(self, batch: DecodeBatch) -> Sampled:
        stages = self.layout.stages
        self.shapes.add(batch.page_table.shape[1:])
        fed = [self._fed_back[row % self._rows] for row in batch.rows[0].tolist()]
        self._carried[batch.tick % stages] = [
            _Activation(kept if token == USE_FED_BACK else token)
            for kept, token in zip(fed, batch.tokens.tolist(), strict=True)
        ]
        for activations in self._carried:  # no tick keeps what the one before does not compute
            del activations[len(fed) :]
            activations += [_Activation(self._chance.garbage()) for _ in fed[len(activations) :]]
        for stage, layers in enumerate(self.layout.stage_layers):
            for i, activation in enumerate(self._carried[(batch.tick - stage) % stages]):
                position, pages = int(batch.positions[stage, i]), batch.page_table[stage, i]
                self._run_stage(layers, activation, position, pages)
        return sampled(self._leave((batch.tick - stages + 1) % stages, batch))

    def _run_stage(
        self, layers: tuple[int, ...], activation: _Activation, position: int, pages: np.ndarray
    ) -> None:
        if position == IDLE_ROW:
            assert (pages == NULL_PAGE).all(), "an idle row has pages"
            self.pages.write(layers, self._chance.random.randrange(self.layout.page_size), 1)
            activation.context += self._chance.garbage()
            return
        page, offset = divmod(position, self.layout.page_size)
        self.pages.write(
            layers, int(pages[page]) * self.layout.page_size + offset, activation.token
        )
        activation.context += self.pages.read(layers, pages, position + 1)

    def _leave(self, microbatch: int, batch: DecodeBatch) -> list[int]:
        """The next tokens of the microbatch that leaves."""
        tokens, choice = [], partial(sample, batch.sampling, batch.masks)
        for i, activation in enumerate(self._carried[microbatch]):
            length, row = int(batch.positions[-1, i]) + 1, int(batch.rows[-1, i])
            if length == IDLE_ROW + 1:
                tokens.append(self._chance.garbage())
                continue
            assert row // self._rows == microbatch, "a row of another microbatch"
            history = self._history.setdefault(row, [])
            place = row % self._rows
            tokens.append(choice(i, activation.context, length, history[:length], row=place))
            chosen = max(tokens[-1], 0)  # an id, also where none was chosen
            history += [0] * (length + 1 - len(history))
            history[length] = self._fed_back[place] = chosen
        return tokens


class FakeBothEngine(FakeDecodeEngine):
    """Prefills and decodes, in one pool."""

    accepts = frozenset({StepKind.PREFILL, StepKind.DECODE})

    def __init__(
        self, layout: KVLayout, num_pages: int, rows: int, chance: Chance, *, name: str = "both/0"
    ) -> None:
        super().__init__(layout, num_pages, rows, chance, name=name)
        self._prefills = FakePrefillEngine(layout, num_pages, chance, name=name, pages=self.pages)
        self.mixed: set[tuple[int, int, int, int]] = set()

    def submit(self, step: Step) -> FakeStepTicket:
        self._prefills.transport = self.transport
        if isinstance(step, PrefillStep):
            return self._prefills.submit(step)
        return super().submit(step)


class FakeMixedEngine(FakeBothEngine):
    """Computes chunks and rows in one step, too."""

    accepts = frozenset(StepKind)

    def submit(self, step: Step) -> FakeStepTicket:
        if not isinstance(step, MixedStep):
            return super().submit(step)
        self.mixed.add((*self._prefills.shape(step.chunks), *step.rows.page_table.shape[1:]))
        self._chance.maybe_fail("mixed step")
        with self._donated(), self.pages.donated(self._chance):
            self.pages.copy(step.copies)
            of_chunks = self._prefills.compute(step.chunks)
            return FakeStepTicket(joined(of_chunks, self._compute(step.rows)), self._chance)
