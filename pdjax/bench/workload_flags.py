"""The flags that say what a benchmark plays, and the workload that they name."""

import math
from dataclasses import replace
from typing import Any

from absl import flags

from pdjax.bench.driver import Workload
from pdjax.workloads.arrival import Arrival
from pdjax.workloads.chances import Arrivals, Gaps, lengths_of
from pdjax.workloads.files import read_azure, read_mooncake, read_workload
from pdjax.workloads.synthetic import (
    Shape,
    ShapeMix,
    closed_loop,
    conversations,
    open_loop,
    shared_prefixes,
)
from pdjax.workloads.transforms import at_rate, mean_rate, scaled, within

READERS = ("saved", "mooncake", "azure")
_OF_DRAWN = (
    *("burstiness", "think_s", "think_burstiness", "input_len", "output_len", "mix", "turns"),
    *("turn_input_len", "prefix_len", "prefix_groups", "prefix_share"),
)
"""The flags that only a workload that is drawn goes by."""
_UNUSED = {
    "": ("spread_s",),
    "saved": (*_OF_DRAWN, "seed", "spread_s"),
    "mooncake": _OF_DRAWN,
    "azure": (*_OF_DRAWN, "spread_s"),
}
"""The flags that would change nothing, by the reader of a file, "" of what is drawn."""


def define(values: flags.FlagValues) -> None:
    """Define the flags of a workload."""
    of: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string(
        "workload",
        None,
        "replay a file: saved:PATH, mooncake:PATH or azure:PATH; else one is drawn",
        **of,
    )
    flags.DEFINE_integer(
        "num_prompts",
        100,
        "requests; of conversations, sessions; of what was saved, all unless this is given",
        **of,
    )
    flags.DEFINE_float(
        "request_rate",
        None,
        "arrivals a second; inf is all at once; a trace has its own unless this is given (default: "
        "4 of what is drawn)",
        **of,
    )
    flags.DEFINE_float("burstiness", 1.0, "shape of the gamma gaps; 1 is Poisson", **of)
    flags.DEFINE_integer(
        "max_concurrency", None, "clients of a closed loop, in place of a rate", **of
    )
    flags.DEFINE_float("think_s", 0.0, "seconds between an answer and the next request, mean", **of)
    flags.DEFINE_float("think_burstiness", math.inf, "shape of their gamma distribution", **of)
    lengths = "as 512, 100-2000, lognormal:MEAN:CV[:MOST], or with weights 0.8*100-300+0.2*4096"
    flags.DEFINE_string("input_len", "512", f"tokens of prompts, {lengths}", **of)
    flags.DEFINE_string("output_len", "128", "tokens of answers, likewise", **of)
    flags.DEFINE_multi_string(
        "mix", [], "WEIGHT/INPUT/OUTPUT: a kind of request, in place of both; may be repeated", **of
    )
    flags.DEFINE_string("turns", None, "of a conversation, likewise; else there is none", **of)
    flags.DEFINE_string("turn_input_len", "64", "new tokens of each later turn, likewise", **of)
    flags.DEFINE_string("prefix_len", None, "of shared prefixes before prompts, likewise", **of)
    flags.DEFINE_integer("prefix_groups", 1, "how many prefixes there are", **of)
    flags.DEFINE_float("prefix_share", 1.0, "of the requests that have one", **of)
    flags.DEFINE_float("spread_s", 0.0, "spreads each moment of a Mooncake trace so far", **of)
    flags.DEFINE_float("time_scale", 1.0, "multiplies moments and think times", **of)
    flags.DEFINE_float("input_scale", 1.0, "multiplies prompts, piece by piece", **of)
    flags.DEFINE_float("output_scale", 1.0, "multiplies answers", **of)
    flags.DEFINE_integer("context", None, "tokens to which a request is cut", **of)
    flags.DEFINE_bool("cut", True, "cut what is too long, instead of leaving it out", **of)
    flags.DEFINE_integer("seed", 0, "of all chance", **of)


def made(values: flags.FlagValues, rate: float | None = None) -> Workload:
    """The workload that flags name, before it is cut to a context.

    Args:
      rate: in place of `--request_rate`.

    Raises:
      ValueError: flags out of range, or that contradict each other.
      OSError: a file cannot be read.
    """
    flag: dict[str, Any] = {name: values[name].value for name in values}
    rate = flag["request_rate"] if rate is None else rate
    clients, is_read = flag["max_concurrency"], bool(flag["workload"])
    if flag["num_prompts"] < 1:
        raise ValueError(f"num_prompts={flag['num_prompts']}: must be at least 1")
    if clients is not None and (rate is not None or flag["turns"] or is_read):
        raise ValueError(
            f"max_concurrency={clients}: is of a closed loop, which has neither request_rate, nor "
            "turns, nor a file"
        )
    if flag["time_scale"] != 1 and (rate is not None or not is_read):
        raise ValueError(
            f"time_scale={flag['time_scale']}: is of a file, whose rate is not given besides"
        )
    _check_given(values)
    if is_read:
        arrivals = _scaled(_read(values, flag), flag)
        arrivals = arrivals if rate is None else _at(arrivals, rate)
        offered = mean_rate(arrivals) or math.inf
        return Workload(arrivals, offered, None, None, flag["seed"])
    rate = math.inf if clients is not None else 4.0 if rate is None else rate
    burstiness = None if clients is not None else flag["burstiness"]
    return Workload(_scaled(_draw(flag, rate), flag), rate, burstiness, clients, flag["seed"])


def _check_given(values: flags.FlagValues) -> None:
    """Refuse flags that were given and that this kind of workload does not go by."""
    kind = (values["workload"].value or "").partition(":")[0]
    for name in _UNUSED.get(kind, ()):
        if values[name].present:
            workload = f"workload={kind}:FILE" if kind else "a workload that is drawn"
            raise ValueError(f"{name}={values[name].value}: changes nothing of {workload}")


def _scaled(arrivals: list[Arrival], flag: dict[str, Any]) -> list[Arrival]:
    time, prompt, output = (flag[f"{kind}_scale"] for kind in ("time", "input", "output"))
    return scaled(arrivals, time=time, prompt=prompt, output=output)


def cut(values: flags.FlagValues, workload: Workload, context: int | None) -> Workload:
    """What of a workload fits into `--context`, or else into that of the model.

    Raises:
      ValueError: nothing does.
    """
    longest = values["context"].value or context
    kept = workload.arrivals
    if longest is not None:
        kept = within(kept, longest, cut=bool(values["cut"].value))
    if not kept:
        raise ValueError(f"workload: no request fits into {longest} tokens")
    return replace(workload, arrivals=kept)


def asked(values: flags.FlagValues) -> dict[str, Any]:
    """The flags of a workload that were given, for its record."""
    own = flags.FlagValues()
    define(own)
    return {name: values[name].value for name in own if values[name].present}


def _read(values: flags.FlagValues, flag: dict[str, Any]) -> list[Arrival]:
    kind, _, path = flag["workload"].partition(":")
    if kind not in READERS or not path:
        raise ValueError(
            f"workload={flag['workload']!r}: must be one of {', '.join(READERS)}, a colon and a "
            "path"
        )
    limit, seed = flag["num_prompts"], flag["seed"]
    if kind == "mooncake":
        return read_mooncake(path, limit=limit, spread=flag["spread_s"], seed=seed)
    if kind == "azure":
        return read_azure(path, limit=limit, seed=seed)
    # Those that a request comes after stand before it, so that the first ones are a workload, too.
    return read_workload(path, limit=limit if values["num_prompts"].present else None)


def _at(arrivals: list[Arrival], rate: float) -> list[Arrival]:
    return scaled(arrivals, time=0.0) if rate == math.inf else at_rate(arrivals, rate)


def _draw(flag: dict[str, Any], rate: float) -> list[Arrival]:
    count, seed = flag["num_prompts"], flag["seed"]
    shape: Shape | ShapeMix = Shape(lengths_of(flag["input_len"]), lengths_of(flag["output_len"]))
    if flag["mix"]:
        shape = _mix(flag["mix"])
    think = Gaps(flag["think_s"], flag["think_burstiness"])
    if flag["max_concurrency"] is not None:
        return closed_loop(flag["max_concurrency"], shape, count, think, seed)
    process = Arrivals(rate, flag["burstiness"])
    if flag["turns"]:
        if isinstance(shape, ShapeMix) or flag["prefix_len"]:
            raise ValueError("turns: conversations have neither mix nor prefix_len")
        later = Shape(lengths_of(flag["turn_input_len"]), shape.output)
        turns = lengths_of(flag["turns"])
        return conversations(process, shape, later, turns, count, think, seed)
    if flag["prefix_len"]:
        groups, share = flag["prefix_groups"], flag["prefix_share"]
        prefix = lengths_of(flag["prefix_len"])
        return shared_prefixes(process, prefix, shape, count, groups, share, seed)
    return open_loop(process, shape, count, seed)


def _mix(kinds: list[str]) -> ShapeMix:
    shapes, weights = list[Shape](), list[float]()
    for kind in kinds:
        try:
            weight, prompt, output = kind.split("/")
            weights.append(float(weight))
        except ValueError as error:
            raise ValueError(f"mix={kind!r}: must be as 0.8/100-300/50") from error
        shapes.append(Shape(lengths_of(prompt), lengths_of(output)))
    return ShapeMix(shapes, weights)
