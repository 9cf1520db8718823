"""The models and prompts of `mixes`, and the ways to serve them that devices allow."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import numpy as np

from pdjax import Config, SamplingParams
from pdjax.config import RANDOM, DecodeConfig, KVConfig, ModelConfig, PrefillConfig
from pdjax.core.model_spec import ModelSpec


@dataclass(frozen=True)
class Scale:
    """A model and its requests.

    Attributes:
      spec: the model's shapes; every tp of 1, 2 and 4 divides them.
      lengths: tokens of the prompts: around a page, around a chunk, several chunks.
      outputs: tokens of the answers, in turns, so that rows become free at different times.
      page_size, budget, rows: fields of the config.
    """

    spec: ModelSpec
    lengths: tuple[int, ...]
    outputs: tuple[int, ...]
    page_size: int
    budget: int
    rows: int = 8

    def prompts(self, seed: int) -> list[list[int]]:
        """Draw random prompts, the same for the same seed."""
        rng = np.random.default_rng(seed)
        return [rng.integers(1, self.spec.vocab_size, n).tolist() for n in self.lengths]

    def params(self, most: int = 1 << 20, logprobs: int | None = None) -> list[SamplingParams]:
        """Make the params of the prompts, for at most `most` tokens each."""
        how: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "logprobs": logprobs}
        each = [SamplingParams(max_tokens=min(n, most), **how) for n in self.outputs]
        return [params for params, _ in zip(cycle(each), self.lengths, strict=False)]


SCALES = {
    "small": Scale(
        ModelSpec(
            vocab_size=32000,
            num_layers=8,
            model_dim=1024,
            mlp_dim=2816,
            query_heads=16,
            kv_heads=8,
            head_dim=64,
            context=1024,
        ),
        lengths=(5, 600, 16, 17, 129, 31, 450, 64, 100, 511, 127, 256, 40, 383, 200, 300),
        outputs=(48, 24),
        page_size=16,
        budget=128,
    ),
    # small enough that a CPU compiles and runs it in seconds
    "tiny": Scale(
        ModelSpec(
            vocab_size=211,
            num_layers=4,
            model_dim=32,
            mlp_dim=64,
            query_heads=8,
            kv_heads=4,
            head_dim=8,
            context=128,
        ),
        lengths=(1, 60, 4, 5, 17, 8, 45, 16, 10, 51),
        outputs=(12, 6),
        page_size=4,
        budget=16,
        rows=4,
    ),
}


@dataclass(frozen=True)
class Mix:
    """A way to serve: `changes` of the config of the truth, by dotted names.

    It makes `passes` over the same prompts; from the second on, the prefix cache has them.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    passes: int = 1


def truth(scale: Scale, devices: int, cache: str | None) -> Config:
    """Make the config of the truth: one device for both phases, one bucket of each kind."""
    # One page more: the coordinator keeps one in reserve for each sequence that decodes.
    longest = max(scale.lengths) + max(scale.outputs) + scale.page_size
    context, sequences = -(-longest // scale.page_size), 4
    return Config(
        model=ModelConfig(source=RANDOM, spec=scale.spec, max_model_len=longest),
        kv=KVConfig(page_size=scale.page_size, prefix_cache=False),
        prefill=PrefillConfig(
            token_budget=scale.budget,
            max_sequences=sequences,
            token_buckets=(scale.budget,),
            page_buckets=(max(context, scale.budget // scale.page_size + sequences),),
        ),
        decode=DecodeConfig(rows=scale.rows, page_buckets=(context,)),
        colocated=True,
        cpu_devices=devices,
        warm_up=False,  # a few prompts compile only the buckets that the others need
        compilation_cache=cache,
    )


def mixes(devices: int, scale: Scale) -> list[Mix]:
    """List the mixes for `devices` devices; they use a power of two, at most the KV heads."""
    most = min(devices, scale.spec.kv_heads)
    n = 1 << (most.bit_length() - 1)
    return [*layouts(n), *handoffs(n, scale)]


def layouts(n: int) -> list[Mix]:
    """List every kind of mesh for either phase, over n devices, a power of two."""
    same = {"shared_devices": True}
    if n == 1:
        return [Mix("tp1 & tp1", same)]
    found = [
        Mix("tp1 + tp1"),
        Mix(f"tp{n} & {n} stages", same | {"prefill.tp": n, "decode.stages": n}),
        Mix(f"tp{n} & tp{n}", same | {"prefill.tp": n, "decode.tp": n}),
        Mix(f"tp1 & {n} stages", same | {"decode.stages": n}),
        Mix(f"tp{n} & tp1", same | {"prefill.tp": n}),
    ]
    if n >= 4:
        half = n // 2
        halves, whole = {"prefill.tp": half}, same | {"prefill.tp": n}
        found += [
            Mix(f"tp{half} + {half} stages", halves | {"decode.stages": half}),
            Mix(f"tp{half} + tp{half}", halves | {"decode.tp": half}),
            Mix(f"tp{n} & {half} stages of tp2", whole | {"decode.stages": half, "decode.tp": 2}),
            Mix("two tp1 + two tp1", {"prefill.engines": 2, "decode.engines": 2}),
        ]
    return found


def handoffs(n: int, scale: Scale) -> list[Mix]:
    """List the other ways to hand over, from one device to another, or to itself if n is 1."""
    base = {"shared_devices": n == 1}
    kept = {"kv.prefix_cache": True, "handoff.give_back": True}
    found = [
        Mix("in bulk", base | {"handoff.streaming": False}),
        Mix("checksums", base | {"handoff.checksums": True}),
        Mix("decode pages doubled", base | {"decode.page_size": 2 * scale.page_size}),
        Mix("given back, asked twice", base | kept, passes=2),
    ]
    if n >= 2:
        two = {"decode.engines": 2, "handoff.rebalance": True, "shared_devices": n == 2}
        joined = "&" if n == 2 else "+"
        found.append(Mix(f"tp1 {joined} two tp1, rebalanced", two))
    return found


def chosen(all_of_them: Sequence[Mix], wanted: Iterable[str]) -> list[Mix]:
    """Choose the mixes with one of `wanted` in the name; all, if `wanted` is empty.

    Raises:
      ValueError: no mix has such a name.
    """
    wanted = list(wanted)
    found = [mix for mix in all_of_them if not wanted or any(part in mix.name for part in wanted)]
    if not found:
        names = ", ".join(mix.name for mix in all_of_them)
        raise ValueError(f"mixes={wanted}: none of {names}")
    return found
