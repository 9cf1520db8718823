"""Calibrations: what steps, links and memories of a kind of hardware were measured to take.

Those that come along are in `calibrations/`, with the names of the measurements that they are of. A
file of `python -m experiments.bench_steps` is one, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from pdjax.config import Config
from pdjax.core.kv_layout import KVLayout
from pdjax.core.messages import shown
from pdjax.core.model_spec import ModelSpec
from pdjax.core.moe_spec import MoeSpec, spec_of_sizes
from pdjax.core.numbers import is_number
from pdjax.formats.json_file import read_json
from pdjax.sim.links import Link
from pdjax.sim.measured_costs import Fitted, MeasuredCosts, fit
from pdjax.sim.step_cases import DecodeCase, MixedCase, PrefillCase

_FOLDER = Path(__file__).parent / "calibrations"
NAMES = tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))
"""Calibrations that come along."""

_FREE = ("context", "rope", "norm_eps", "eos_token_ids", "tied", "qkv_bias")
"""Fields of a ModelSpec on which the time of a step does not depend, or hardly."""
_LINK_SOURCE = "link: "
"""What the source of a link begins with."""
_ITEM_BYTES = {"float32": 4, "bfloat16": 2}

_Case = TypeVar("_Case", DecodeCase, PrefillCase, MixedCase)


@dataclass(frozen=True)
class Calibration:
    """What was measured of one chip, and of the link between two.

    Attributes:
      name: of the calibration, or the path of its file.
      hardware: the chip.
      model: the name of the model's shapes; `sizes` are they, by the fields of ModelSpec.
      dtype, kv_dtype: of weights and of KV.
      sources: the measurements that it is of.
      costs: of steps, fitted to them.
      points: each measured step beside the fit.
      link: between two chips; None where it was not measured.
      memory_bytes: of a chip; None where it is not known.
    """

    name: str
    hardware: str
    model: str
    sizes: Mapping[str, Any]
    dtype: str
    kv_dtype: str
    sources: tuple[str, ...]
    costs: MeasuredCosts
    points: tuple[Fitted, ...]
    link: Link | None
    memory_bytes: float | None

    @classmethod
    def load(cls, name: str) -> "Calibration":
        """The calibration of a name of `NAMES`, or of a file.

        Raises:
          ValueError: no such name or file, or one that does not say what is needed.
        """
        path = _FOLDER / f"{name}.json" if name in NAMES else Path(name)
        if name not in NAMES and not path.is_file():
            raise ValueError(
                f"costs={shown(name)}: must be one of {', '.join(NAMES)}, or a file that "
                "experiments.bench_steps has written"
            )
        return cls._of(name, path, read_json(path))

    @classmethod
    def _of(cls, name: str, path: Path, found: dict[str, Any]) -> "Calibration":
        for key in ("model", "spec", "dtype", "kv_dtype", "decode", "prefill"):
            if key not in found:
                raise ValueError(
                    f"{path}: has no {key!r}; bench_steps writes it since its results have the "
                    "shapes of their model"
                )
        decode = _points(path, found, "decode", DecodeCase)
        prefill = _points(path, found, "prefill", PrefillCase)
        mixed = _points(path, found, "mixed", MixedCase)
        try:
            write = _number(path, found, "write_s") or MeasuredCosts.write
            spec = spec_of_sizes(found["spec"], 1)
            used = spec.share_used if isinstance(spec, MoeSpec) else 1.0
            costs, points = fit(decode, prefill, mixed, write=write, share_used=used)
            link = Link(**found["link"]) if "link" in found else None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        hardware = found.get("hardware") or ", ".join(dict.fromkeys(found.get("devices", ())))
        commit = found.get("commit")
        sources = found.get("sources") or [f"{path}" + (f", commit {commit}" if commit else "")]
        return cls(
            name=name,
            hardware=hardware or "unknown hardware",
            model=str(found["model"]),
            sizes=dict(found["spec"]),
            dtype=str(found["dtype"]),
            kv_dtype=str(found["kv_dtype"]),
            sources=tuple(map(str, sources)),
            costs=costs,
            points=points,
            link=link,
            memory_bytes=_number(path, found, "memory_bytes"),
        )

    def with_link(self, link: Link) -> "Calibration":
        """The same chips with another link between them, in place of the measured one and of its
        source."""
        given = f"{_LINK_SOURCE}as given, {link.bandwidth / 1e9:.4g} GB/s"
        kept = (each for each in self.sources if not each.startswith(_LINK_SOURCE))
        sources = (*kept, f"{given} after {link.latency * 1e3:.3g} ms")
        return replace(self, link=link, sources=sources)

    def with_memory(self, memory_bytes: float) -> "Calibration":
        """The same with chips of another memory.

        Raises:
          ValueError: less than the weights take.
        """
        if not memory_bytes > self.weights_bytes:
            raise ValueError(
                f"memory_gb={memory_bytes / 1e9:g}: must be more than the weights take, "
                f"{self.weights_bytes / 1e9:.1f}"
            )
        return replace(self, memory_bytes=memory_bytes)

    def check_model(self, spec: ModelSpec, dtype: str, kv_dtype: str) -> None:
        """Refuse a model that this is not of: times do not follow from those of another one.

        Raises:
          ValueError: other shapes, or other types.
        """
        own = self.spec(spec.context)
        for field in fields(MoeSpec if isinstance(spec, MoeSpec) else ModelSpec):
            asked, known = getattr(spec, field.name), getattr(own, field.name, None)
            if field.name not in _FREE and asked != known:
                raise ValueError(
                    f"model.spec: {field.name}={shown(asked)}, but the calibration {self.name} is "
                    f"of {self.model}, with {shown(known)}; measure the model with "
                    "experiments.bench_steps, and name the file by --costs"
                )
        for name, type_, calibrated in (
            ("model.dtype", dtype, self.dtype),
            ("decode.kv_dtype", kv_dtype, self.kv_dtype),
        ):
            if type_ != calibrated:
                raise ValueError(
                    f"{name}={type_!r}: the calibration {self.name} is of {calibrated!r}"
                )

    def spec(self, context: int) -> ModelSpec:
        """Its model, for sequences of at most so many tokens; see `spec_of_sizes`."""
        return spec_of_sizes(self.sizes, context)

    def layout(self, page_size: int) -> KVLayout:
        """Of its KV pages."""
        sizes = self.sizes["num_layers"], self.sizes["kv_heads"], self.sizes["head_dim"]
        itemsize = _ITEM_BYTES[self.kv_dtype]
        return KVLayout.of_heads(
            *sizes, page_size=page_size, dtype=self.kv_dtype, itemsize=itemsize
        )

    @property
    def weights_bytes(self) -> int:
        """Of all weights: matrices of attention and of the MLPs, the embedding, the output."""
        spec = self.spec(1)
        wide = spec.head_dim * (2 * spec.query_heads + 2 * spec.kv_heads)
        outside = 2 * spec.vocab_size * spec.model_dim
        count = spec.num_layers * spec.model_dim * wide + spec.mlp_params + outside
        return count * _ITEM_BYTES[self.dtype]

    def pages(self, page_size: int, share: float) -> int | None:
        """Pages that a chip has room for, in a share of what the weights leave free; None where its
        memory is not known."""
        if self.memory_bytes is None:
            return None
        free = self.memory_bytes - self.weights_bytes
        return int(free * share) // self.layout(page_size).page_bytes

    @property
    def worst(self) -> dict[str, Fitted]:
        """The largest error of the fit for each kind of step."""
        kinds = dict.fromkeys(point.kind for point in self.points)
        return {
            kind: max((p for p in self.points if p.kind == kind), key=lambda p: abs(p.error))
            for kind in kinds
        }

    @property
    def limits(self) -> tuple[int, int, int]:
        """How far was measured: most rows of a tick, the longest context of one, and fewest tokens
        of a prefill step."""
        ticks = [DecodeCase.parse(p.case) for p in self.points if p.kind == "decode"]
        steps = [PrefillCase.parse(p.case) for p in self.points if p.kind == "prefill"]
        return (
            max(case.rows for case in ticks),
            max(case.context for case in ticks),
            min(case.tokens for case in steps),
        )

    def validity(self) -> list[str]:
        """Sentences about what it is of, how well the fit does, and where it was not measured."""
        rows, context, tokens = self.limits
        told = [
            f"Steps cost what they were measured to cost on {self.hardware}, for {self.model} in "
            f"{self.dtype}, one chip an engine."
        ]
        for kind, point in self.worst.items():
            count = sum(p.kind == kind for p in self.points)
            told.append(
                f"Of {count} measured {kind} steps the fit misses {point.case} most, by "
                f"{point.error:+.1%}."
            )
        told.append(
            f"Measured were ticks of up to {rows} rows and {context:,} tokens a row, and prefill "
            f"steps of {tokens:,} tokens and more; beyond that, and in smaller chunks, costs are "
            "extrapolated."
        )
        if self.costs.share_used < 1:
            told.append(
                "Experts are touched as if each token's were drawn: "
                f"{self.costs.touched(1):.0%} of them by one row, {self.costs.touched(rows):.0%} "
                f"by {rows}. Prompts of one kind touch fewer."
            )
        if "mixed" not in self.worst:
            told.append(
                "Mixed steps were not measured: their cost is composed of those of their parts, "
                "with the weights read once."
            )
        return told


def _points(
    path: Path, found: dict[str, Any], kind: str, case: type[_Case]
) -> list[tuple[_Case, float]]:
    """Shapes and seconds of a section of a file."""
    rows = found.get(kind, [])
    try:
        points = [(case.parse(row["case"]), row["ms"] / 1e3) for row in rows]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: {kind}: must be objects with case and ms ({error})") from error
    for shape, seconds in points:
        if not 0 < seconds < float("inf"):
            raise ValueError(f"{path}: {kind} {shape.name}: ms must be more than 0")
    return points


def _number(path: Path, found: dict[str, Any], name: str) -> float | None:
    value = found.get(name)
    if value is not None and not (is_number(value) and value > 0):
        raise ValueError(f"{path}: {name}={shown(value)}: must be a positive number")
    return value


def check_one_chip(config: Config) -> None:
    """Refuse engines that a calibration says nothing of.

    Raises:
      ValueError: engines of several chips.
    """
    for name, value in (
        ("prefill.tp", config.prefill.tp),
        ("decode.tp", config.decode.tp),
        ("decode.stages", config.decode.stages),
    ):
        if value != 1:
            raise ValueError(f"{name}={value}: must be 1; calibrations are of engines of one chip")
