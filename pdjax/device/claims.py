"""The pools that a config asks for, and what lies beside them: before any of it is on a device."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from pdjax.config import Config, DecodeConfig, PrefillConfig
from pdjax.config.checks import MOST_TOKENS
from pdjax.core.ids import PoolId
from pdjax.core.kv_layout import KVLayout, split_groups
from pdjax.core.model_spec import ModelSpec
from pdjax.core.roles import Role
from pdjax.device.kv.sizing import Claim
from pdjax.device.mesh import (
    DECODE_RULES,
    PREFILL_RULES,
    STAGE,
    TP,
    WHOLE_EXPERTS,
    Device,
    Rules,
)
from pdjax.device.models.registry import family_of, kv_layout
from pdjax.device.models.weight_layout import WeightLayout, check_shards


@dataclass(frozen=True)
class PoolClaim:
    """A pool that a config asks for.

    Attributes:
      id: its name.
      role: of the engines over it: PREFILL, DECODE, or MIXED where it is both ends.
      claim: its part in what memory there is.
      rules: how the weights of its engines lie.
    """

    id: PoolId
    role: Role
    claim: Claim
    rules: Rules

    def weight_bytes(self, spec: ModelSpec, dtype: str) -> int:
        """Bytes that the weights take on each of the pool's devices."""
        layout = self.claim.layout
        axes = AxisType.Auto, AxisType.Auto
        mesh = AbstractMesh((layout.stages, layout.tp), (STAGE, TP), axis_types=axes)
        weights = WeightLayout(spec, mesh, self.rules, layout.stage_layers)
        shards = [
            weights.sharding(weight, stacked=True).shard_shape(weights.stacked_shape(weight))
            for slot in weights.layer_weights
            for weight in slot
        ]
        shards += [
            weights.sharding(weight, stacked=False).shard_shape(weights.shape(weight))
            for weight in weights.outside
        ]
        return sum(map(math.prod, shards)) * jnp.dtype(dtype).itemsize


class Claims:
    """The pools of a config.

    Args:
      config: the run.
      spec: the model's shapes.
      context: longest sequence served, tokens.

    Raises:
      ValueError: a layout that cannot work, with the field, its value and what is allowed.
    """

    def __init__(self, config: Config, spec: ModelSpec, context: int) -> None:
        self._config, self._context = config, context
        p, d = config.prefill, config.decode
        dtype = config.kv.dtype or config.model.dtype
        with _fields_of("model.spec"):
            family_of(spec).kinds(spec)
        with _fields_of("prefill"):
            self._prefill_layout = kv_layout(spec, config.kv.page_size, dtype, tp=p.tp)
            self._prefill_rules = _checked_rules(spec, PREFILL_RULES, p)
        with _fields_of("decode"):
            self._decode_layout = kv_layout(
                spec, config.decode_page_size, d.kv_dtype or dtype, d.stages, d.tp
            )
            # Of one stage both rules say the same; prefill steps go by their own.
            its_rules = PREFILL_RULES if config.decode_is_flexible else DECODE_RULES
            self._decode_rules = _checked_rules(spec, its_rules, d)
        with _fields_of("handoff"):
            split_groups(spec.num_layers, config.handoff.layer_groups or 1)
        # A step that is dispatched ahead has sequences of its own.
        steps = 1 + p.lookahead
        self._prefill_pages = p.pages or self._whole_contexts(
            self._prefill_layout, steps * p.max_sequences
        )
        self._decode_pages = d.pages or self._whole_contexts(self._decode_layout, d.rows)

    def of(
        self, for_prefill: Sequence[Sequence[Device]], for_decode: Sequence[Sequence[Device]]
    ) -> list[PoolClaim]:
        """Every pool, those that prefill first.

        Args:
          for_prefill, for_decode: devices of each engine; of a colocated config, the same.
        """
        sources, targets = self._prefill_rules, self._decode_rules
        if self._config.colocated:
            return [
                PoolClaim(PoolId(f"hbm/{i}"), Role.MIXED, self._both(Role.PREFILL, each), sources)
                for i, each in enumerate(for_prefill)
            ]
        return [
            PoolClaim(PoolId(f"hbm/prefill-{i}"), Role.PREFILL, self._source(each), sources)
            for i, each in enumerate(for_prefill)
        ] + [
            PoolClaim(PoolId(f"hbm/decode-{i}"), Role.DECODE, self._target(each), targets)
            for i, each in enumerate(for_decode)
        ]

    def _source(self, devices: Sequence[Device]) -> Claim:
        """The pool of a prefill engine."""
        if self._config.prefill_is_flexible:
            return self._both(Role.PREFILL, devices)
        fixed = self._config.prefill.pages is not None
        pages, layout = self._prefill_pages, self._prefill_layout
        return Claim("prefill.pages", fixed, pages, layout, self._context, devices)

    def _target(self, devices: Sequence[Device]) -> Claim:
        """The pool of a decode engine."""
        if self._config.decode_is_flexible:
            return self._both(Role.DECODE, devices)
        fixed = self._config.decode.pages is not None
        pages, layout = self._decode_pages, self._decode_layout
        return Claim("decode.pages", fixed, pages, layout, self._context, devices)

    def _both(self, role: Role, devices: Sequence[Device]) -> Claim:
        """A pool with the pages of both ends and one null page, laid out as for the role."""
        sides = {"prefill.pages": self._config.prefill.pages}
        sides["decode.pages"] = self._config.decode.pages
        left_open = [name for name, pages in sides.items() if not pages]
        field = " and ".join(left_open or sides)
        pages = self._prefill_pages + self._decode_pages - 1
        layout = self._prefill_layout if role is Role.PREFILL else self._decode_layout
        claim = Claim(field, not left_open, pages, layout, self._context, devices)
        if len(left_open) != 1:
            return claim
        part = next((name, said) for name, said in sides.items() if said)
        return replace(claim, part=part)

    def _whole_contexts(self, layout: KVLayout, sequences: int) -> int:
        """Pages for so many sequences of the longest kind, and the null page; at most as many as
        have slots that 32 bits can count."""
        wanted = 1 + sequences * layout.pages_for(self._context)
        return min(wanted, (2 * MOST_TOKENS - 1) // layout.page_size)


@contextmanager
def _fields_of(owner: str) -> Iterator[None]:
    """What is wrong with a layout names a field of its own; here it is one of the config."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{owner}.{error}") from error


def _checked_rules(
    spec: ModelSpec, rules: Rules, its_config: PrefillConfig | DecodeConfig
) -> Rules:
    """The rules of a phase, with experts where the config has them.

    Raises:
      ValueError: the weights do not divide into the shards, or whole experts of a model without.
    """
    if its_config.experts == "whole":
        if not family_of(spec).experts:
            raise ValueError(f"experts='whole': the family {spec.family} has no experts")
        rules = {**rules, **WHOLE_EXPERTS}
    check_shards(spec, rules, its_config.tp)
    return rules
