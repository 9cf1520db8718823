"""Costs of steps that follow from measured ones: a few coefficients, fitted to their times."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pdjax.core.moe_spec import share_touched
from pdjax.interfaces.batches import DecodeBatch, PrefillBatch
from pdjax.sim.costs import StepCosts
from pdjax.sim.step_cases import DecodeCase, MixedCase, PrefillCase


class Fitted(NamedTuple):
    """A measured step beside what the coefficients say of it.

    Attributes:
      kind: "decode", "prefill" or "mixed".
      case: its shape, as `step_cases` names it.
      measured, fitted: seconds.
    """

    kind: str
    case: str
    measured: float
    fitted: float

    @property
    def error(self) -> float:
        """Of the fit, as a part of what was measured; below 0 where it is too short."""
        return self.fitted / self.measured - 1


@dataclass(frozen=True)
class MeasuredCosts(StepCosts):
    """Seconds of steps on one chip.

    A tick takes `tick` for the weights that it reads, `tick_row` for each row that it computes and
    `tick_kv_token` for each token of KV. A prefill step takes `prefill_step`, `prefill_token` for
    each token and `prefill_pair` for each pair of a computed token and one that it sees, but no
    less than the weights take to be read. These are the features that simulators of this field fit
    (DistServe, Zhong et al. 2024: tokens and their squares; Dynamo's planner: tokens of KV).

    A mixed step reads the weights once, while its tokens, of chunks and of rows, are computed; then
    comes attention, of chunks and of rows. That is worked out, and multiplied by `mixed_scale`.

    Of a model with experts a step reads those that its tokens touch: the more tokens, the more of
    them, up to all (`MoeSpec.share_touched`).

    Attributes:
      prefill_pair: seconds of each pair, over all layers.
      mixed_scale: mean ratio of measured mixed steps to what is worked out; 1 where none was
        measured.
      tick_experts: seconds of the reading of all experts, beside `tick`.
      share_used: share of the experts that a token goes through; 1 of a model without.
    """

    prefill_pair: float = 0.0
    mixed_scale: float = 1.0
    tick_experts: float = 0.0
    share_used: float = 1.0

    def touched(self, tokens: float) -> float:
        """Share of the experts that a step of so many tokens reads."""
        return share_touched(self.share_used, tokens)

    def prefill_seconds(self, batch: PrefillBatch) -> float:
        tokens, pairs = _work(batch)
        return self._computing(tokens) + pairs * self.prefill_pair

    def tick_seconds(self, batch: DecodeBatch) -> float:
        stages, computed = np.shape(batch.positions)
        reading = self._reading(_active(batch) / stages)
        return reading + computed * self.tick_row + _seen(batch) / stages * self.tick_kv_token

    def mixed_seconds(self, chunks: PrefillBatch, rows: DecodeBatch) -> float:
        tokens, pairs = _work(chunks)
        attention = pairs * self.prefill_pair + _seen(rows) * self.tick_kv_token
        return (self._computing(tokens + _active(rows)) + attention) * self.mixed_scale

    def _reading(self, tokens: float) -> float:
        """Of the weights, for so many tokens."""
        return self.tick + self.touched(tokens) * self.tick_experts

    def _computing(self, tokens: int) -> float:
        """Of all but attention, for so many tokens."""
        return max(self._reading(tokens), self.prefill_step + tokens * self.prefill_token)

    def of_decode(self, case: DecodeCase) -> float:
        """Seconds of a tick of a shape; it computes the rows that are active."""
        rows = case.rows * self.tick_row
        return self._reading(case.rows) + rows + case.tokens * self.tick_kv_token

    def of_prefill(self, case: PrefillCase) -> float:
        """Seconds of a prefill step of a shape."""
        return self._computing(case.tokens) + case.pairs * self.prefill_pair

    def of_mixed(self, case: MixedCase) -> float:
        """Seconds of a mixed step of a shape."""
        chunks, rows = case.chunks, case.rows
        attention = chunks.pairs * self.prefill_pair + rows.tokens * self.tick_kv_token
        return (self._computing(chunks.tokens + rows.rows) + attention) * self.mixed_scale


def fit(
    decode: Sequence[tuple[DecodeCase, float]],
    prefill: Sequence[tuple[PrefillCase, float]],
    mixed: Sequence[tuple[MixedCase, float]] = (),
    *,
    write: float = StepCosts.write,
    share_used: float = 1.0,
) -> tuple[MeasuredCosts, tuple[Fitted, ...]]:
    """Fit costs to measured steps, by least squares of relative errors.

    Args:
      decode, prefill, mixed: shapes and seconds.
      write: seconds of the writing of a transfer job.
      share_used: share of the experts that a token goes through; 1 of a model without.

    Returns:
      the costs, and each measured step beside them.

    Raises:
      ValueError: fewer than three shapes of ticks or of prefill steps, with experts four of ticks,
        or shapes that do not tell the coefficients apart.
    """

    def features(case: DecodeCase) -> tuple[float, ...]:
        of_all = 1, case.rows, case.tokens
        return of_all if share_used == 1 else (*of_all, share_touched(share_used, case.rows))

    tick, row, seen, *experts = _coefficients(
        "decode", [(features(case), seconds) for case, seconds in decode]
    )
    step, token, pair = _coefficients(
        "prefill", [((1, case.tokens, case.pairs), seconds) for case, seconds in prefill]
    )
    costs = MeasuredCosts(
        prefill_step=step,
        prefill_token=token,
        prefill_pair=pair,
        tick=tick,
        tick_row=row,
        tick_kv_token=seen,
        tick_experts=sum(experts),
        share_used=share_used,
        write=write,
    )
    if mixed:
        ratios = [seconds / costs.of_mixed(case) for case, seconds in mixed]
        scale = float(np.exp(np.mean(np.log(ratios))))
        costs = MeasuredCosts(**{**vars(costs), "mixed_scale": scale})
    points = [
        *(Fitted("decode", case.name, took, costs.of_decode(case)) for case, took in decode),
        *(Fitted("prefill", case.name, took, costs.of_prefill(case)) for case, took in prefill),
        *(Fitted("mixed", case.name, took, costs.of_mixed(case)) for case, took in mixed),
    ]
    return costs, tuple(points)


def _coefficients(
    kind: str, points: Sequence[tuple[tuple[float, ...], float]]
) -> tuple[float, ...]:
    """A coefficient a feature, none below 0. Where the best one of a feature is, the feature is
    left out: what was measured does not show it."""
    count = len(points[0][0]) if points else 3
    features = np.array([each for each, _ in points], np.float64).reshape(-1, count)
    seconds = np.array([took for _, took in points], np.float64)
    if np.linalg.matrix_rank(features / features.max(axis=0, initial=1)) < count:
        raise ValueError(
            f"{kind}: {len(points)} shapes were measured; at least {count} are needed that differ "
            "in tokens, in rows or prompts, and in lengths"
        )
    kept, found = list(range(count)), np.zeros(count)
    while kept:
        some = features[:, kept] / seconds[:, None]
        scale = np.abs(some).max(axis=0)
        best = np.linalg.lstsq(some / scale, np.ones(len(seconds)), rcond=None)[0] / scale
        if (best >= 0).all():
            found[kept] = best
            break
        kept.pop(int(np.argmin(best * scale)))
    return tuple(map(float, found))


def _work(batch: PrefillBatch) -> tuple[int, int]:
    """Tokens that a prefill step computes, and pairs of one and another that it sees."""
    lengths = np.diff(np.asarray(batch.cu_q_lens)).astype(np.int64)
    ends = np.asarray(batch.kv_lens).astype(np.int64)
    # A chunk of n tokens that ends at k sees k - n + 1, ..., k of them.
    return int(lengths.sum()), int((lengths * (2 * ends - lengths + 1) // 2).sum())


def _active(batch: DecodeBatch) -> int:
    """Rows that are active, over all stages."""
    return int((np.asarray(batch.positions) >= 0).sum())


def _seen(batch: DecodeBatch) -> int:
    """Tokens of KV that the active rows read, over all stages."""
    positions = np.asarray(batch.positions)
    return int((positions + 1)[positions >= 0].sum())
