"""What does a hand-off cost, and how much of it is hidden behind the prefill?

One prompt at a time goes from a prefill engine to a decode engine with random weights, in several
ways: in bulk after its prefill, or streamed in layer groups as they are computed (with one group,
all of a step's KV leaves behind the step, without a wait for the host); exact, or rounded in
transit. For each way and length:

  alone     a shipment of all its pages with both engines idle, beside one plain put of as many
            bytes: gather, wire and scatter by themselves
  served    through the coordinator: time on the wire, its parts after the prefill's end (exposed)
            and before (hidden), when the last bytes arrived (0: before the prefill's end), and the
            time that the hand-off adds between the end of the prefill and the dispatch of the first
            decode tick of the sequence
  traced    with --trace, which takes longer: by the clock of the sending device, beside one plain
            put, both after a rest: copies, the gathers before them, the wait between, and the time
            from the prefill's end to the end of the last copy

The floor is bytes over the link's bandwidth, measured by one large plain put.

  python -m experiments.handoff --model=llama3_8b --prompt=2048 --prompt=8192 --groups=0 --groups=4
  python -m experiments.handoff --model=tiny --layout=2x2x1 --prompt=24 --groups=2 --wire=int8

--layout=TPxSTAGESxTP is prefill shards x decode stages x shards of a stage; it may be repeated, as
--prompt, --groups and --wire may. Prints a table, writes JSON, and a picture with --plot.
"""

import gc
import itertools
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from absl import flags

from experiments.common.origin import origin, save
from experiments.common.programs import clear_programs
from experiments.common.shapes import MODELS, SHAPES, chosen_model
from experiments.common.tables import megabytes, number, percent, table
from experiments.handoff.pair import OUTPUT, EnginePair, Watch, Way, in_groups
from experiments.handoff.picture import draw
from pdjax import Config
from pdjax.config import RANDOM, DecodeConfig, KVConfig, ModelConfig, PrefillConfig
from pdjax.config.checks import one_of
from pdjax.core.kv_layout import QUANTISED_DTYPES
from pdjax.flags import new_flags, run

FLAGS = new_flags()
_MODEL = flags.DEFINE_enum("model", None, list(MODELS), SHAPES, flag_values=FLAGS)
_LAYERS = flags.DEFINE_integer("layers", None, "layers instead of the model's", flag_values=FLAGS)
_LAYOUT = flags.DEFINE_multi_string("layout", ["1x1x1"], "TPxSTAGESxTP", flag_values=FLAGS)
_PROMPT = flags.DEFINE_multi_integer("prompt", [2048], "tokens of a prompt", flag_values=FLAGS)
_GROUPS = flags.DEFINE_multi_integer(
    "groups",
    None,
    "layer groups, 0: bulk; 0 and 4, or one a layer, unless given",
    flag_values=FLAGS,
)
_WIRE = flags.DEFINE_multi_string("wire", ["exact"], "exact, or a wire_dtype", flag_values=FLAGS)
_CHECKSUMS = flags.DEFINE_bool("checksums", False, "check every page", flag_values=FLAGS)
_BUDGET = flags.DEFINE_integer("budget", 2048, "tokens of a prefill step", flag_values=FLAGS)
_PAGE_SIZE = flags.DEFINE_integer("page_size", 64, "tokens a page", flag_values=FLAGS)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "prompts of each kind", flag_values=FLAGS)
_PEAK = flags.DEFINE_integer("peak_bytes", 1 << 30, "bytes of the large put", flag_values=FLAGS)
_TRACE = flags.DEFINE_bool("trace", False, "also time by the profiler's clock", flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", "results/handoff.json", "file to write", flag_values=FLAGS)
_PLOT = flags.DEFINE_string("plot", None, "file of a picture; needs matplotlib", flag_values=FLAGS)


def make_config(model: str, layers: int | None, layout: str, prompts: list[int]) -> Config:
    """Make a config for these prompts, one after another, with as few buckets as possible.

    Raises:
      ValueError: the layout is not three positive numbers.
    """
    sizes = layout.split("x")
    if len(sizes) != 3 or not all(size.isdigit() and int(size) for size in sizes):
        raise ValueError(f"layout={layout!r}: must be TPxSTAGESxTP, such as 1x1x1")
    tp_p, stages, tp_d = map(int, sizes)
    page_size, longest = _PAGE_SIZE.value or 1, max(prompts) + OUTPUT
    budget = min(_BUDGET.value or 1, max(prompts))
    spec = MODELS[model]
    context = -(-longest // page_size)
    return Config(
        model=ModelConfig(
            source=RANDOM,
            spec=replace(spec, num_layers=layers or spec.num_layers, context=longest),
            dtype="float32" if model == "tiny" else "bfloat16",
        ),
        kv=KVConfig(page_size=page_size, prefix_cache=False),
        prefill=PrefillConfig(
            tp=tp_p,
            token_budget=budget,
            max_sequences=1,
            token_buckets=(budget,),
            page_buckets=(max(context, -(-budget // page_size) + 1),),
            pages=4 * context + 1,
        ),
        decode=DecodeConfig(
            stages=stages, tp=tp_d, rows=4 * stages, page_buckets=(context,), pages=4 * context + 1
        ),
        warm_up=False,
    )


def measure(
    pair: EnginePair, way: Way, prompts: Iterable[int], rate: float
) -> list[dict[str, Any]]:
    """Measure all prompts of one way; `rate` is the link's, in bytes a second."""
    coordinator, recorder, transport = pair.open(way)
    [over_devices] = transport.transports
    points, watch = [], Watch(over_devices, pair.llm.clock.now)
    for n in prompts:
        alone = pair.alone(way, transport, n)
        watch.take(0.0, rate)
        rounds = _ROUNDS.value or 1
        served = pair.served(coordinator, recorder, watch, n, rounds, rate)
        point = {
            "prompt": n,
            "alone": _values(alone, "of_put"),
            "served": _values(served, "hidden"),
        }
        if _TRACE.value:
            by_device = pair.traced(coordinator, transport, n, served.nbytes, rounds)
            point["traced"] = by_device and _values(by_device, "of_put", "of_put_in_all")
            watch.take(0.0, rate)
        points.append(asdict(way) | point)
        print(
            f"{way.layout} {way.wire} {in_groups(way.groups)}, {n} tokens: "
            f"adds {served.added_ms:.2f} ms, hidden {served.hidden:.0%}, "
            f"alone {alone.of_put:.0%} of a plain put",
            flush=True,
        )
    return points


def _values(numbers: Any, *derived: str) -> dict[str, Any]:
    """Convert a dataclass, and some of its properties, to plain values."""
    return asdict(numbers) | {name: getattr(numbers, name) for name in derived}


def show(points: list[dict[str, Any]]) -> str:
    """Make the tables."""
    names = [f"{p['layout']} {p['wire']} {in_groups(p['groups'])}, {p['prompt']}" for p in points]
    alone = [
        [
            name,
            megabytes(p["alone"]["nbytes"]),
            *(number(p["alone"][key], 2) for key in ("put_ms", "gather_wire_ms", "scatter_ms")),
            percent(p["alone"]["of_put"]),
        ]
        for name, p in zip(names, points, strict=True)
    ]
    keys = ("prefill_ms", "floor_ms", "wire_ms", "exposed_ms", "arrived_ms", "added_ms", "delay_ms")
    served = [
        [
            name,
            *(number(p["served"][key], 2) for key in keys),
            percent(p["served"]["hidden"]),
            str(p["served"]["shipments"]),
        ]
        for name, p in zip(names, points, strict=True)
    ]
    head = ["alone: layout wire groups, tokens", "MB", "put, ms", "moved", "written", "of put"]
    served_head = ["served", "prefill, ms", "floor", "wire", "exposed", "arrived", "added"]
    served_head += ["delay", "hidden", "shipments"]
    tables = [table(head, alone), table(served_head, served)]
    if any("traced" in p for p in points):
        tables.append(_show_traced(names, points))
    return "\n\n".join(tables)


def _show_traced(names: list[str], points: list[dict[str, Any]]) -> str:
    keys = ("put_ms", "copy_ms", "gather_ms", "wait_ms", "behind_ms")
    rows = []
    for name, point in zip(names, points, strict=True):
        traced = point["traced"] or {}
        cells = [number(traced.get(key), 3) for key in keys]
        shares = [percent(traced.get(key)) for key in ("of_put", "of_put_in_all")]
        rows.append([name, *cells, *shares])
    head = ["traced", "put, ms", "copied", "gathered", "waited", "behind", "of put", "in all"]
    return table(head, rows)


def asked_ways(layers: int) -> list[tuple[int, str]]:
    """List the layer groups and wire types to measure.

    Raises:
      ValueError: one is impossible; raised before any engine is made.
    """
    groups = _GROUPS.value or (0, min(4, layers))
    for n in groups:
        if not 0 <= n <= layers:
            raise ValueError(
                f"groups={n}: must be 0, in bulk, or at most one for each of the model's {layers} "
                "layers"
            )
    wires = _WIRE.value or ()
    for wire in wires:
        one_of("wire", wire, ("exact", *QUANTISED_DTYPES))
    return list(itertools.product(groups, wires))


def main() -> None:
    """Measure, print, save; see the module."""
    prompts = sorted(_PROMPT.value or ())
    layouts = _LAYOUT.value or ()
    tiny = [make_config("tiny", _LAYERS.value, layout, prompts) for layout in layouts]
    model = chosen_model(_MODEL.value, *tiny)
    ways = asked_ways(_LAYERS.value or MODELS[model].num_layers)
    points: list[dict[str, Any]] = []
    peaks: dict[str, float] = {}
    for layout in layouts:
        pair = EnginePair(make_config(model, _LAYERS.value, layout, prompts))
        peaks[layout] = pair.bandwidth(_PEAK.value or 1)
        for groups, wire in ways:
            way = Way(layout, groups, wire, bool(_CHECKSUMS.value))
            points += measure(pair, way, prompts, peaks[layout])
        del pair
        gc.collect()
        clear_programs()
    print(show(points))
    print("\n".join(f"{layout}: link {rate / 1e9:.1f} GB/s" for layout, rate in peaks.items()))
    whole = {"model": model, "peak_bytes_per_s": peaks, "points": points} | origin()
    save(whole, _OUT.value)
    if _PLOT.value:
        draw(whole, Path(_PLOT.value))


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
