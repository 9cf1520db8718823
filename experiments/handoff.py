"""What does a hand-off cost, and how much of it is hidden behind the prefill?

One prompt at a time goes from a prefill engine to a decode engine with random weights, in several
ways: in bulk when its prefill has ended (one layer group), or streamed in more groups; exact, or
rounded for the way. For each way and length:

  alone     a shipment of all its pages with both engines idle, beside one plain put of as many
            bytes: gather, wire and scatter by themselves
  served    through the coordinator: time on the wire, what of it came after the prefill's end
            (exposed), what before (hidden), and what the hand-off adds between the end of the
            prefill and the dispatch of the first decode tick with the sequence in it

The floor is bytes over the link's bandwidth, measured by one large plain put.

  python -m experiments.handoff --model=llama3_8b --prompt=2048 --prompt=8192 --groups=1 --groups=8
  python -m experiments.handoff --model=tiny --layout=2x2x1 --prompt=24 --groups=2 --wire=int8

--layout=TPxSTAGESxTP is prefill shards x decode stages x shards of a stage; it may be repeated, as
--prompt, --groups and --wire may. Prints a table, writes JSON, and a picture with --plot.
"""

import gc
import itertools
import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments.handoff_picture import draw
from experiments.origin import origin
from experiments.shapes import MODELS
from experiments.tables import megabytes, number, percent, table
from pdjax import LLM, Config, SamplingParams
from pdjax.config import (
    RANDOM,
    DecodeConfig,
    HandoffConfig,
    KVConfig,
    ModelConfig,
    PrefillConfig,
)
from pdjax.device.engine import JaxPrefillEngine
from pdjax.device.kv.transfer import DeviceTransfer
from pdjax.engine_api import End, Shipment, Side
from pdjax.flags import new_flags, run
from pdjax.host.batch import span_pages
from pdjax.host.coordinator import Coordinator
from pdjax.host.metrics import Recorder
from pdjax.request import Request

FLAGS = new_flags()
_MODEL = flags.DEFINE_enum("model", "llama3_8b", list(MODELS), "shapes", flag_values=FLAGS)
_LAYERS = flags.DEFINE_integer("layers", None, "instead of the model's", flag_values=FLAGS)
_LAYOUT = flags.DEFINE_multi_string("layout", ["1x1x1"], "TPxSTAGESxTP", flag_values=FLAGS)
_PROMPT = flags.DEFINE_multi_integer("prompt", [2048], "tokens", flag_values=FLAGS)
_GROUPS = flags.DEFINE_multi_integer("groups", [1, 8], "layer groups; 1: bulk", flag_values=FLAGS)
_WIRE = flags.DEFINE_multi_string("wire", ["exact"], "exact, or a wire_dtype", flag_values=FLAGS)
_CHECKSUMS = flags.DEFINE_bool("checksums", False, "check every page", flag_values=FLAGS)
_BUDGET = flags.DEFINE_integer("budget", 2048, "tokens of a prefill step", flag_values=FLAGS)
_PAGE_SIZE = flags.DEFINE_integer("page_size", 64, "tokens a page", flag_values=FLAGS)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "prompts of each kind", flag_values=FLAGS)
_PEAK = flags.DEFINE_integer("peak_bytes", 1 << 30, "of the large put", flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", "results/handoff.json", "file", flag_values=FLAGS)
_PLOT = flags.DEFINE_string("plot", None, "file of a picture; needs matplotlib", flag_values=FLAGS)

SOURCE, TARGET = End(Side.PREFILL, 0), End(Side.DECODE, 0)
OUTPUT = 4
"""Tokens of an answer: the first from the prefill, the others decoded."""


@dataclass(frozen=True)
class Way:
    """How the KV of a prompt travels: from which layout to which, in how many layer groups (1: in
    bulk), in which format."""

    layout: str
    groups: int
    wire: str
    checksums: bool

    @property
    def handoff(self) -> HandoffConfig:
        return HandoffConfig(
            streaming=self.groups > 1,
            layer_groups=self.groups,
            wire_dtype=None if self.wire == "exact" else self.wire,
            checksums=self.checksums,
        )


@dataclass(frozen=True)
class Alone:
    """A shipment with nothing beside it; milliseconds, the best of a few.

    Attributes:
      nbytes: that travelled.
      gather_wire_ms: from its dispatch to its arrival.
      scatter_ms: from its arrival to its being written.
      put_ms: one plain put of as many bytes as a link carries of them.
    """

    nbytes: int
    gather_wire_ms: float
    scatter_ms: float
    put_ms: float

    @property
    def of_put(self) -> float:
        """Its rate from dispatch to arrival, as a share of the plain put's."""
        return self.put_ms / self.gather_wire_ms


@dataclass(frozen=True)
class Served:
    """Medians over the prompts of a kind; milliseconds.

    Attributes:
      prefill_ms: dispatch of the first chunk to the first token.
      added_ms: first token to the dispatch of the first decode tick with the sequence in it.
      wire_ms, exposed_ms, gather_ms: see `transfer_metrics.TransferTotals`.
      floor_ms: bytes over the link's bandwidth.
      nbytes, shipments: of one prompt.
    """

    prefill_ms: float
    added_ms: float
    wire_ms: float
    exposed_ms: float
    gather_ms: float
    floor_ms: float
    nbytes: float
    shipments: int

    @property
    def hidden(self) -> float:
        """Share of the time on the wire that the prefill hid."""
        return 1 - self.exposed_ms / self.wire_ms if self.wire_ms else 1.0


def make_config(model: str, layers: int | None, layout: str, prompts: list[int]) -> Config:
    """Engines for these prompts, one after another, with as few buckets as that needs.

    Raises:
      ValueError: a layout that is not three positive numbers.
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
        kv=KVConfig(page_size=page_size),
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


class House:
    """One pair of engines, and the ways to hand over between them.

    Args:
      config: of the engines.
    """

    def __init__(self, config: Config) -> None:
        self.llm = llm = LLM(config)
        self._engine = llm.prefill_engines[0]
        self._pools = {SOURCE: self._engine._pool, TARGET: llm.decode_engines[0]._pool}

    def open(self, way: Way) -> tuple[Coordinator, Recorder, DeviceTransfer]:
        """A coordinator for one way, warm; weights and pools are the same for all of them."""
        llm = self.llm
        engine = JaxPrefillEngine(
            self._engine._params,
            llm.spec,
            self._pools[SOURCE],
            max_logprobs=llm.config.max_logprobs,
            layer_groups=way.groups,
        )
        transfer = DeviceTransfer(self._pools, way.handoff.wire_dtype)
        recorder = Recorder(llm.clock)
        coordinator = Coordinator(
            replace(llm.config, handoff=way.handoff),
            vocab_size=llm.spec.vocab_size,
            max_model_len=llm.max_model_len,
            end_token_ids=(),
            prefill_engines=[engine],
            decode_engines=llm.decode_engines,
            transfer=transfer,
            clock=llm.clock,
            recorder=recorder,
        )
        coordinator.warm_up()
        return coordinator, recorder, transfer

    def links(self) -> int:
        """Pairs of devices over which the KV of all layers travels at once."""
        source, target = (self._pools[end].layout for end in (SOURCE, TARGET))
        return min(source.tp, target.tp * target.stages)

    def alone(self, way: Way, coordinator: Coordinator, transfer: DeviceTransfer, n: int) -> Alone:
        """A shipment of the pages of n tokens."""
        layout, buckets, now = self._engine.layout, coordinator.buckets, self.llm.clock.now
        spans = -(-n // buckets.span)
        pages = list(range(1, 1 + layout.pages_for(n)))
        from_ = span_pages([(pages, range(spans))], layout.page_size, buckets)
        size = self._pools[TARGET].layout.page_size
        table_pages = list(range(1, 1 + -(-n // size)))
        to = span_pages([(table_pages, range(spans))], size, buckets)
        layers = range(layout.num_layers)
        moving, writing, nbytes = [], [], 0
        for _ in range(5):
            began = now()
            shipment = Shipment(SOURCE, TARGET, layers, from_, len(pages), way.checksums)
            ticket = transfer.send(shipment)
            nbytes = ticket.result().bytes
            arrived = now()
            transfer.land(ticket, to).result()
            moving.append(arrived - began)
            writing.append(now() - arrived)
        put = transfer.probe(SOURCE, TARGET, nbytes // self.links())
        return Alone(nbytes, min(moving) * 1e3, min(writing) * 1e3, put * 1e3)

    def served(
        self, coordinator: Coordinator, recorder: Recorder, n: int, rounds: int, rate: float
    ) -> Served:
        """Prompts of n random tokens, one at a time; `rate` bytes a second is the link's."""
        rng, clock = np.random.default_rng(n), self.llm.clock
        params = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True)
        seen: list[list[float]] = []
        shipments = 0
        for turn in range(1 + rounds):
            recorder.clear()
            prompt = tuple(rng.integers(1, self.llm.spec.vocab_size, n).tolist())
            name = f"{n}/{turn}"
            [sequence] = coordinator.submit(Request(name, prompt, params, clock.now()))
            while coordinator.has_work:
                coordinator.step()
            if sequence.error is not None:
                raise RuntimeError(f"prompt={n}: {sequence.error}")
            metrics = recorder.request(sequence)
            marks, moved = dict(metrics.marks), metrics.transfer
            ticks = [s.start for s in recorder.spans() if s.track == "decode/0"]
            seen.append(
                [
                    marks["first_token"] - marks["prefill_started"],
                    min(ticks) - marks["first_token"],
                    moved.wire_s,
                    moved.exposed_s,
                    moved.gather_s,
                    moved.bytes / rate,
                    moved.bytes,
                ]
            )
            shipments = moved.shipments
        # The first one warms up.
        columns = zip(*seen[1:], strict=True)
        prefill, added, wire, exposed, gather, floor, nbytes = map(statistics.median, columns)
        return Served(
            prefill_ms=prefill * 1e3,
            added_ms=added * 1e3,
            wire_ms=wire * 1e3,
            exposed_ms=exposed * 1e3,
            gather_ms=gather * 1e3,
            floor_ms=floor * 1e3,
            nbytes=nbytes,
            shipments=shipments,
        )


def measure(house: House, way: Way, prompts: Iterable[int], rate: float) -> list[dict[str, Any]]:
    """All prompts of one way, as plain values."""
    coordinator, recorder, transfer = house.open(way)
    points = []
    for n in prompts:
        alone = house.alone(way, coordinator, transfer, n)
        served = house.served(coordinator, recorder, n, _ROUNDS.value or 1, rate)
        points.append(
            asdict(way)
            | {"prompt": n, "alone": asdict(alone) | {"of_put": alone.of_put}}
            | {"served": asdict(served) | {"hidden": served.hidden}}
        )
        print(
            f"{way.layout} {way.wire} {way.groups} groups, {n} tokens: adds {served.added_ms:.2f} "
            f"ms, hidden {served.hidden:.0%}, alone {alone.of_put:.0%} of a plain put",
            flush=True,
        )
    return points


def show(points: list[dict[str, Any]]) -> str:
    """The tables."""
    names = [f"{p['layout']} {p['wire']} {p['groups']} x {p['prompt']}" for p in points]
    alone = [
        [
            name,
            megabytes(p["alone"]["nbytes"]),
            *(number(p["alone"][key], 2) for key in ("put_ms", "gather_wire_ms", "scatter_ms")),
            percent(p["alone"]["of_put"]),
        ]
        for name, p in zip(names, points, strict=True)
    ]
    keys = ("prefill_ms", "floor_ms", "wire_ms", "exposed_ms", "added_ms")
    served = [
        [
            name,
            *(number(p["served"][key], 2) for key in keys),
            percent(p["served"]["hidden"]),
            str(p["served"]["shipments"]),
        ]
        for name, p in zip(names, points, strict=True)
    ]
    head = ["alone: layout wire groups x tokens", "MB", "put, ms", "moved", "written", "of put"]
    served_head = ["served", "prefill, ms", "floor", "wire", "exposed", "added", "hidden", "pieces"]
    return table(head, alone) + "\n\n" + table(served_head, served)


def main() -> None:
    """Measure, print, save; see the module."""
    prompts = sorted(_PROMPT.value or ())
    points: list[dict[str, Any]] = []
    peaks: dict[str, float] = {}
    for layout in _LAYOUT.value or ():
        house = House(make_config(_MODEL.value or "", _LAYERS.value, layout, prompts))
        nbytes = _PEAK.value or 1
        probe = DeviceTransfer(house._pools).probe(SOURCE, TARGET, nbytes)
        peaks[layout] = house.links() * nbytes / probe
        for groups, wire in itertools.product(_GROUPS.value or (), _WIRE.value or ()):
            way = Way(layout, groups, wire, bool(_CHECKSUMS.value))
            points += measure(house, way, prompts, peaks[layout])
        del house
        gc.collect()
        jax.clear_caches()
    print(show(points))
    print("\n".join(f"{layout}: link {rate / 1e9:.1f} GB/s" for layout, rate in peaks.items()))
    whole = {"model": _MODEL.value, "peak_bytes_per_s": peaks, "points": points} | origin()
    out = Path(_OUT.value or "")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(whole, indent=1) + "\n")
    print(f"saved {out}")
    if _PLOT.value:
        draw(whole, Path(_PLOT.value))
        print(f"saved {_PLOT.value}")


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
