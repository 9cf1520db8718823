"""What a step of an engine is given and what comes back, as numpy arrays."""

from dataclasses import dataclass
from typing import Any

import numpy as np

USE_FED_BACK = -1
"""In `DecodeBatch.tokens`: the row's input is the token that the device sampled for it last."""


IDLE_ROW = -1
"""In `DecodeBatch.positions`: the entry computes no row; it writes to the null page and its token
means nothing."""


NOT_FINITE = -1
"""In `Sampled.tokens`: the row's logits are not all finite, so no token was chosen."""


NO_TOKEN = 2**31 - 1
"""In `SamplingBatch.bias_tokens`: no token's logit is changed."""


Array = Any
"""A numpy array as it goes through the door; a traced one inside a step on the other side."""


@dataclass(frozen=True)
class SamplingBatch:
    """How the next token of each row is chosen; fields of `SamplingParams`, one entry a row.

    Rows without a sequence are greedy and ask for nothing.
    """

    temperature: Array  # f32[B]
    top_k: Array  # i32[B]
    top_p: Array  # f32[B]
    min_p: Array  # f32[B]
    presence_penalty: Array  # f32[B]
    frequency_penalty: Array  # f32[B]
    repetition_penalty: Array  # f32[B]
    seed: Array  # u32[B]
    prompt_lens: Array  # i32[B]: how much of the history is prompt, not output
    logprobs: Array  # bool[B]: whether log-probabilities are wanted
    # Added to logits, E = MAX_LOGIT_BIAS of a row; None where no row has any.
    bias_tokens: Array | None = None  # i32[B, E]; NO_TOKEN past a row's last
    bias: Array | None = None  # f32[B, E]


@dataclass(frozen=True)
class Masks:
    """The tokens that some rows of a batch, or entries of a tick, may choose; the others may choose
    any.

    A row's mask depends on its last token, so that it is new at each step.
    """

    rows: Array  # i32[G], ascending
    bits: Array  # u32[G, ceil(V / 32)]: bit t % 32 of word t // 32 allows token t; at least one


@dataclass(frozen=True)
class ScoreBatch:
    """Tokens of prompts whose log-probabilities are wanted; S counts them."""

    at: Array  # i32[S]: index of the packed token before each; its logits tell
    targets: Array  # i32[S]: the tokens


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the tokens of a ScoreBatch, in its order; padding may follow them."""

    chosen: Array  # f32[S]; NaN where the logits are not finite
    ranks: Array  # i32[S]: place among all tokens, the likeliest first, from 1
    top_ids: Array  # i32[S, n], best first
    top_logprobs: Array  # f32[S, n]


@dataclass(frozen=True)
class Sampled:
    """Chosen tokens and log-probabilities (undefined where they were not asked for)."""

    tokens: Array  # i32[B]; NOT_FINITE in place of a token where a row's logits are not finite
    chosen_logprobs: Array  # f32[B]
    top_ids: Array  # i32[B, n], best first
    top_logprobs: Array  # f32[B, n]
    scores: Scores | None = None  # of a step with chunks that was asked for them

    def split(self, first: int) -> "tuple[Sampled, Sampled]":
        """The first so many rows, with the scores, and the others."""
        return self._some(slice(first), self.scores), self._some(slice(first, None), None)

    def _some(self, rows: slice, scores: Scores | None) -> "Sampled":
        return Sampled(
            self.tokens[rows],
            self.chosen_logprobs[rows],
            self.top_ids[rows],
            self.top_logprobs[rows],
            scores,
        )


def joined(first: Sampled, then: Sampled) -> Sampled:
    """The rows of both, with the scores of the first; the opposite of `Sampled.split`."""
    return Sampled(
        np.concatenate([first.tokens, then.tokens]),
        np.concatenate([first.chosen_logprobs, then.chosen_logprobs]),
        np.concatenate([first.top_ids, then.top_ids]),
        np.concatenate([first.top_logprobs, then.top_logprobs]),
        first.scores,
    )


@dataclass(frozen=True)
class PrefillBatch:
    """Chunks of several prompts, packed and padded to a bucket. B counts sequences, T tokens, Z
    pages.

    Sequence b owns tokens `cu_q_lens[b]:cu_q_lens[b+1]` and pages
    `kv_pages[cu_pages[b]:cu_pages[b+1]]`, the latter in the order of their positions and including
    the pages that earlier chunks wrote. Padding tokens are past `cu_q_lens[B]` and write to the
    null page.
    """

    tokens: Array  # i32[T]
    positions: Array  # i32[T]
    slot_mapping: Array  # i32[T]: page * page_size + offset
    kv_pages: Array  # i32[Z]
    cu_pages: Array  # i32[B + 1]
    cu_q_lens: Array  # i32[B + 1]
    kv_lens: Array  # i32[B]: tokens in KV, this chunk's included
    sample_at: Array  # i32[B]: index of a chunk's last token; its logits choose the next
    sampling: SamplingBatch  # [B]
    # i32[B, C]: all tokens so far; None where no row is penalized, biased or masked.
    history: Array | None
    masks: Masks | None = None  # of the rows that have one
    scored: ScoreBatch | None = None  # None: no sequence asks for log-probabilities of its prompt


@dataclass(frozen=True)
class DecodeBatch:
    """One tick of a decode pipeline of R stages and R microbatches of b rows each.

    At tick t stage s works on microbatch (t - s) mod R. So microbatch t mod R *enters* stage 0 with
    its input tokens, and microbatch (t - R + 1) mod R *leaves* the last stage and has its next
    tokens sampled; those are kept on the device and fed back when it enters again, at the next
    tick. With R = 1 a tick is a whole decode step.

    A tick computes n <= b entries of each microbatch, each a row of it, so that rows without
    a sequence cost nothing. From the tick at which a microbatch enters to that at which it leaves,
    a row keeps its entry. Nothing that is kept of a row moves, whatever n the next tick has.

    The host describes the entries under every stage anew at each tick. So a row that it drops is
    idle at once in all stages, and its pages may be given to another sequence before the pipeline
    has drained.
    """

    tick: int
    tokens: Array  # i32[n]: input of the microbatch that enters, or USE_FED_BACK
    rows: Array  # i32[R, n]: 0 <= row < R * b of each entry under each stage; any of an idle entry
    positions: Array  # i32[R, n]: position of the input token under each stage, or IDLE_ROW
    page_table: Array  # i32[R, n, W]: pages under each stage, null where there are none
    sampling: SamplingBatch  # [b]: of all rows of the microbatch that leaves
    masks: Masks | None = None  # of its entries that have one

    @property
    def leaving_places(self) -> Array:
        """i32[n]: of the entries that leave, their rows' places in `sampling`."""
        return self.rows[-1] % len(self.sampling.seed)
