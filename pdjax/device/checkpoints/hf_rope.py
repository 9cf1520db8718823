"""RoPE as `config.json` describes it -> RopeSpec.

transformers 5 writes one object, `rope_parameters`; older versions wrote `rope_theta` beside
`rope_scaling`, and a user may add either to a file that has the other. Where several fields say the
same, the one counts that counts in transformers 5.24.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from pdjax.core.messages import shown
from pdjax.core.model_spec import MAX_NUMBER, RopeSpec
from pdjax.device.checkpoints.hf_fields import Fields

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
TRAINED = "original_max_position_embeddings"

_LOG = logging.getLogger("pdjax")

_NEUTRAL = {
    "attn_factor": 1.0,
    "extrapolation_factor": 1.0,
    "apply_yarn_scaling": True,
    "llama_4_scaling_beta": 0.0,
}
"""Fields that some systems compute with and transformers does not, and the value that changes
nothing."""

_READ = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", TRAINED, "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor",
        TRAINED,
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "beta_fast",
        "beta_slow",
        "truncate",
    ),
    "longrope": ("factor", TRAINED, "attention_factor", "long_factor", "short_factor"),
}


def read_rope(
    config: Fields,
    context: int,
    head_dim: int,
    *,
    absent_theta: float = 10000.0,
    absent_share: float | None = None,
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> RopeSpec:
    """The position embedding of a model whose `max_position_embeddings` is `context`.

    Args:
      config: the file.
      context: tokens.
      head_dim: of the model.
      absent_theta: what transformers takes for no base.
      absent_share: what it takes for no `partial_rotary_factor`; None: this model type rotates
        whole heads.
      aliases: types of RoPE that this model type has under other names.

    Raises:
      ValueError: naming a field that is missing, malformed or not supported.
    """
    rope = _rope_object(config)
    _check_flat(rope)
    return _read(config, rope, context, head_dim, absent_theta, absent_share, aliases)


def read_rope_of_layers(
    config: Fields, context: int, head_dim: int, *, layers: str, theta: str, absent_theta: float
) -> RopeSpec:
    """The position embedding of the layers of one type, of a model whose layers have several.

    Args:
      config, context, head_dim: see `read_rope`.
      layers: their type, which `rope_parameters` has an object for.
      theta: the field of files before transformers 5 that holds their base.
      absent_theta: what transformers takes for no base.

    Raises:
      ValueError: naming a field that is missing, malformed or not supported.
    """
    known = ("full_attention", "sliding_attention")
    written: dict[str, Any] = {"rope_theta": config.number(theta, absent_theta)}
    if config.get("rope_parameters") is not None:
        parameters = config.object("rope_parameters")
        for name in parameters.names():
            if name not in known:
                raise parameters.refuse(name, f"an object for each of {', '.join(known)}")
        if parameters.get(layers) is not None:
            of_layers = parameters.object(layers)
            written |= {name: of_layers.get(name) for name in of_layers.names()}
    if layers == "full_attention" and config.get("rope_scaling") is not None:
        scaling = config.object("rope_scaling")
        written |= {name: scaling.get(name) for name in scaling.names()}
    rope = Fields(f"{config.where} rope_parameters: {layers}:", written)
    _check_flat(rope)
    return _read(config, rope, context, head_dim, absent_theta, None, {})


def _read(
    config: Fields,
    rope: Fields,
    context: int,
    head_dim: int,
    absent_theta: float,
    absent_share: float | None,
    aliases: Mapping[str, str],
) -> RopeSpec:
    """The position embedding that the object `rope` describes."""
    theta = _theta(config, rope, absent_theta)
    dims = _rotary_dim(config, rope, head_dim, absent_share)
    name = "rope_type" if rope.has("rope_type") or not rope.has("type") else "type"
    kind = rope.get(name) if rope.has(name) else "default"
    kind = aliases.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in ROPE_TYPES:
        raise rope.refuse(name, ", ".join(ROPE_TYPES))
    _check_names(config, rope, kind)
    return replace(_scaled(config, rope, kind, name, theta, context), rotary_dim=dims)


def _scaled(
    config: Fields, rope: Fields, kind: str, name: str, theta: float, context: int
) -> RopeSpec:
    if kind == "yarn" and theta == 1:
        raise ValueError(f"{config.where} rope_theta=1; allowed: another number, with {name}=yarn")
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec(theta=theta, kind="linear", factor=rope.number("factor"))
    trained = _trained_context(config, rope, context)
    if kind == "longrope":
        return RopeSpec(
            theta=theta,
            kind="longrope",
            factor=max(rope.number("factor", context / trained), 1.0),
            original_context=trained,
            attention_factor=(
                rope.number("attention_factor") if rope.get("attention_factor") else None
            ),
            divisors=_numbers(rope, "long_factor"),
            short_divisors=_numbers(rope, "short_factor"),
        )
    if kind == "llama3":
        return RopeSpec(
            theta=theta,
            kind="llama3",
            factor=rope.number("factor"),
            original_context=trained,
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
        )
    return _yarn(rope, theta, trained, context)


def stretched_context(rope: RopeSpec, context: int) -> int:
    """Longest sequence, tokens: YaRN's configurations give the trained context and a factor."""
    if rope.kind != "yarn":
        return context
    return max(context, int(min(rope.original_context * rope.factor, MAX_NUMBER)))


def _rope_object(config: Fields) -> Fields:
    """The object that counts: `rope_scaling` if it holds anything, whole, else
    `rope_parameters`."""
    scaling, parameters = (config.get(name) for name in ("rope_scaling", "rope_parameters"))
    if not scaling and not (scaling is None or scaling is False or scaling == {}):
        raise config.refuse("rope_scaling", "an object")
    if not scaling:
        return Fields(config.where, {}) if parameters is None else config.object("rope_parameters")
    found = config.object("rope_scaling")
    if parameters is not None and parameters != scaling:
        _LOG.warning(
            "%s rope_scaling=%s replaces rope_parameters=%s; nothing of the latter is used",
            config.where,
            shown(scaling),
            shown(parameters),
        )
    return found


def _check_flat(rope: Fields) -> None:
    """Refuse an object of objects, one for each type of layer."""
    for name in rope.names():
        if isinstance(rope.get(name), dict):
            raise rope.refuse(name, "one object for all layers, which are of one type")


def _rotary_dim(
    config: Fields, rope: Fields, head_dim: int, absent_share: float | None
) -> int | None:
    """Dimensions of a head that are rotated; None: all."""
    where = rope if rope.get("partial_rotary_factor") is not None else config
    if absent_share is None:
        if where.get("partial_rotary_factor", 1.0) != 1.0:
            raise where.refuse("partial_rotary_factor", "1.0")
        return None
    share = where.number("partial_rotary_factor", absent_share)
    dims = int(head_dim * share)
    if not 2 <= dims <= head_dim or dims % 2 or (head_dim - dims) % 2:
        raise where.refuse(
            "partial_rotary_factor", f"a share of head_dim={head_dim} that is even and at least 2"
        )
    return None if dims == head_dim else dims


def _theta(config: Fields, rope: Fields, absent: float) -> float:
    """The base; a field that is null is refused, since transformers fails there."""
    for fields in (rope, config):
        if fields.has("rope_theta"):
            if fields.get("rope_theta") is None:
                raise fields.refuse("rope_theta", "a positive number")
            return fields.number("rope_theta")
    return absent


def _check_names(config: Fields, rope: Fields, kind: str) -> None:
    for fields in (config, rope):
        for name, neutral in _NEUTRAL.items():
            value = fields.get(name, neutral)
            if value != neutral or isinstance(value, bool) is not isinstance(neutral, bool):
                raise fields.refuse(name, f"{neutral}, or no such field")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_NEUTRAL, *_READ[kind]}
    unknown = [name for name in rope.names() if name not in known]
    if unknown:
        _LOG.warning("%s %s: not used by rope_type=%s", rope.where, ", ".join(unknown[:8]), kind)


def _trained_context(config: Fields, rope: Fields, context: int) -> int:
    """The trained context: the field outside the object wins over the one inside."""
    if config.has(TRAINED):
        return config.integer(TRAINED)
    return rope.integer(TRAINED, context)


def _yarn(rope: Fields, theta: float, trained: int, context: int) -> RopeSpec:
    if rope.has("factor") and rope.get("factor") is None:
        factor = context / trained  # as transformers infers it from a null
    else:
        factor = rope.number("factor")
    return RopeSpec(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_context=trained,
        beta_fast=_number_or(rope, "beta_fast", 32.0),
        beta_slow=_number_or(rope, "beta_slow", 1.0),
        attention_factor=_attention_factor(rope, factor),
        # A null counts as false in transformers, and not as absent.
        truncate=rope.boolean("truncate", not rope.has("truncate")),
    )


def _numbers(rope: Fields, name: str) -> tuple[float, ...]:
    """A list of positive numbers."""
    found = rope.get(name)
    if not isinstance(found, list):
        raise rope.refuse(name, "a list of positive numbers")
    each = Fields(f"{rope.where} {name}:", {str(i): number for i, number in enumerate(found)})
    return tuple(each.number(str(i)) for i in range(len(found)))


def _number_or(rope: Fields, name: str, default: float) -> float:
    """A number; 0 counts as absent."""
    value = rope.get(name, 0)
    absent = isinstance(value, int | float) and not isinstance(value, bool) and value == 0
    return default if absent else rope.number(name)


def _attention_factor(rope: Fields, factor: float) -> float | None:
    """The scale of cos and sin: given, or from the pair `mscale`, `mscale_all_dim`, or None for
    YaRN's own.
    """
    if rope.get("attention_factor") is not None:
        return rope.number("attention_factor")
    over, under = _number_or(rope, "mscale", 0.0), _number_or(rope, "mscale_all_dim", 0.0)
    if not (over and under):
        return None
    log = math.log(max(factor, 1.0))
    return (0.1 * over * log + 1.0) / (0.1 * under * log + 1.0)
