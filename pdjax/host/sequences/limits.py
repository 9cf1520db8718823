"""What a request may ask for. All that can be known at the door is checked there, so that no
sequence that was let in can ever find itself without a place."""

import hashlib
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np

from pdjax.core.messages import prompt_too_long, shown
from pdjax.core.request import Request
from pdjax.host.sequences.prompt_scores import PromptScores
from pdjax.host.sequences.sequence import Sequence


@dataclass(frozen=True)
class Limits:
    """The bounds of one deployment.

    Attributes:
      vocab_size: token ids are below it.
      max_model_len: tokens of prompt and output together.
      max_logprobs: alternatives a token.
      max_waiting: sequences in the waiting queue.
      prefill_tokens: tokens that the largest prefill pool can hold.
      decode_tokens: tokens that the largest decode pool can hold.
      pinned_tokens: of the longest prompt that may be pinned; None where no prefix is kept.
    """

    vocab_size: int
    max_model_len: int
    max_logprobs: int
    max_waiting: int
    prefill_tokens: int
    decode_tokens: int
    pinned_tokens: int | None = None

    def max_new_tokens(self, request: Request) -> int:
        """Tokens that it may generate: `max_tokens`, cut by the context."""
        room = self.max_model_len - len(request.prompt_token_ids)
        most = request.params.max_tokens
        return room if most is None else min(most, room)

    def check(self, request: Request) -> None:
        """Refuse what can never be served.

        The pools must be able to hold the whole of a sequence, its output included, even where
        it is prefilled on one and decoded on another: if it is preempted late, the prefill side
        recomputes it whole.

        Raises:
          ValueError: naming the field, its value and what is allowed.
        """
        prompt, params = request.prompt_token_ids, request.params
        if not prompt:
            raise ValueError(f"prompt_token_ids={prompt}: must have at least one token")
        # What can be said at a glance comes first: everybody who decodes waits meanwhile.
        for name in ("logprobs", "prompt_logprobs"):
            top = getattr(params, name)
            if top is not None and top > self.max_logprobs:
                raise ValueError(f"{name}={shown(top)}: must be at most {self.max_logprobs}")
        if params.n > self.max_waiting:
            raise ValueError(f"n={shown(params.n)}: must be at most max_waiting={self.max_waiting}")
        if len(prompt) >= self.max_model_len:
            raise ValueError(prompt_too_long(len(prompt), self.max_model_len))
        self._check_tokens("prompt_token_ids", prompt)
        self._check_tokens("stop_token_ids", params.stop_token_ids)
        self._check_tokens("logit_bias", tuple(params.logit_bias))
        self._check_tokens("allowed_token_ids", params.allowed_token_ids or ())
        self._check_pools(len(prompt), self.max_new_tokens(request), params.max_tokens)
        if request.cache_pin:
            self._check_pin(request.cache_pin, len(prompt))

    def _check_pin(self, seconds: float, prompt: int) -> None:
        if self.pinned_tokens is None:
            raise ValueError(f"cache_pin={seconds}: needs kv.prefix_cache=True, which keeps pages")
        if prompt > self.pinned_tokens:
            raise ValueError(
                f"cache_pin={seconds}: a prompt of {prompt} tokens; at most {self.pinned_tokens} "
                "may be pinned, by kv.pinned_fraction of a pool and beside the longest request"
            )

    def _check_tokens(self, name: str, token_ids: Seq[Any]) -> None:
        if not token_ids:
            return
        # All at once where all is well: everybody who decodes waits meanwhile.
        plain = set(map(type, token_ids)) == {int}
        if plain and min(token_ids) >= 0 and max(token_ids) < self.vocab_size:
            return
        for token in token_ids:
            whole = isinstance(token, int | np.integer) and not isinstance(token, bool)
            if not whole or not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"{name}: {shown(token)} is not a token id; allowed are 0 to "
                    f"{self.vocab_size - 1}"
                )

    def _check_pools(self, prompt: int, output: int, asked: int | None) -> None:
        pools = {"prefill": self.prefill_tokens}
        if output > 1:  # a single token comes from the prefill; it is never handed over
            pools["decode"] = self.decode_tokens
        phase = min(pools, key=lambda name: pools[name])
        most = pools[phase] + 1 - prompt  # nobody reads the KV of the last token
        if output > most:
            if most < 1:
                raise ValueError(
                    f"prompt_token_ids: {prompt} tokens, but the largest {phase} pool holds "
                    f"{pools[phase]} tokens; allowed are at most {pools[phase]}"
                )
            meaning = " (to the end of the context)" if asked is None else ""
            raise ValueError(
                f"max_tokens={shown(asked)}{meaning}: a prompt of {prompt} tokens and up to "
                f"{output} generated ones; the largest {phase} pool holds {pools[phase]} tokens, "
                f"so allowed is max_tokens at most {most}"
            )


def seed_of(*names: int | str) -> int:
    """A 32-bit seed that is a function of `names` alone, on every machine and in every version."""
    digest = hashlib.blake2b("/".join(map(str, names)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def choices(request: Request, limits: Limits, order: int, drawn_from: int) -> list[Sequence]:
    """The sequences of a request, one for each of its choices.

    Args:
      order: place of the first one among all sequences.
      drawn_from: seed of the deployment, from which a request without one draws its own.
    """
    seed = request.params.seed
    root = ("asked", seed) if seed is not None else ("drawn", drawn_from, order)
    return [
        Sequence(
            request,
            choice,
            seed_of(*root, choice),
            order=order + choice,
            max_new_tokens=limits.max_new_tokens(request),
            prompt_scores=PromptScores.asked_by(request, choice),
        )
        for choice in range(request.params.n)
    ]
