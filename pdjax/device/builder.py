"""From a config to engines: lays out pools, loads weights, connects pools; compiles no steps."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import jax
from jax.sharding import Mesh

from pdjax.config import Config, DecodeConfig, HandoffConfig, PrefillConfig
from pdjax.config.checks import MOST_TOKENS
from pdjax.core.ids import EngineId, PoolId
from pdjax.core.kv_layout import KVLayout, split_groups
from pdjax.core.model_spec import ModelSpec
from pdjax.core.progress import Progress
from pdjax.core.roles import Role
from pdjax.device.checkpoints.api import Checkpoint
from pdjax.device.compat import settings_of_this_thread
from pdjax.device.devices import Workers, deal_devices
from pdjax.device.engine import JaxEngine
from pdjax.device.kv.pool import PoolOwner
from pdjax.device.kv.sizing import Claim, deal_pages
from pdjax.device.kv.transport import DeviceTransport
from pdjax.device.kv.transports import Transports
from pdjax.device.layer_groups import choose_groups
from pdjax.device.mesh import DECODE_RULES, PREFILL_RULES, WHOLE_EXPERTS, Rules, make_mesh
from pdjax.device.models.decoder import Params
from pdjax.device.models.registry import family_of, kv_layout
from pdjax.device.models.weight_layout import check_shards
from pdjax.device.models.weights import copied_params, load_params, random_params
from pdjax.device.programs.decode import DecodeProgram
from pdjax.device.programs.mixed import MixedProgram
from pdjax.device.programs.prefill import PrefillProgram
from pdjax.device.programs.program import Program
from pdjax.interfaces.transport import Transport


@dataclass(frozen=True)
class Engines:
    """The device column of a deployment, ready to be driven through the door.

    Attributes:
      engines: all of them, those that prefill first.
      roles: of each at the start.
      transport: between their pools.
      pools: by their names.
      workers: of their devices.
      on_host_cores: whether the devices are the cores that the host itself needs.
    """

    engines: list[JaxEngine]
    roles: dict[EngineId, Role]
    transport: Transports
    pools: dict[PoolId, PoolOwner]
    workers: Workers
    on_host_cores: bool

    def handing_over(self, handoff: HandoffConfig, layer_groups: int) -> "Engines":
        """Engines over the same weights, pools and workers, whose prefill steps are cut into so
        many layer groups, and whose KV travels as `handoff` says. Of both, one at a time is asked
        anything; what is left in pages is left there."""
        transport = connect(self.pools, handoff.wire_dtype, self.workers)
        engines = [_recut(each, self.pools, transport, layer_groups) for each in self.engines]
        return replace(self, engines=engines, transport=transport)

    def close(self) -> None:
        """Wait until everything that engines were asked has been dispatched, then let go of their
        devices' memory. No engine is asked anything from then on; a second call does nothing."""
        with ExitStack() as closing:  # all of them, also if one is interrupted
            closing.callback(self.transport.close)
            for each in reversed(self.engines):
                closing.callback(each.close)


def connect(
    pools: Mapping[PoolId, PoolOwner], wire_dtype: str | None, workers: Workers
) -> Transports:
    """Every transport between the pools; of two that connect the same, the first is taken.

    Raises:
      ValueError: two pools that cannot hold the same KV, or no such wire type.
    """
    transports: list[Transport] = [
        DeviceTransport(pools, wire_dtype, workers.ahead),
    ]
    by_pool = {name: workers.of(pool.mesh.devices.flat) for name, pool in pools.items()}
    return Transports(
        transports, {name: worker for name, worker in by_pool.items() if worker is not None}
    )


def _recut(
    engine: JaxEngine,
    pools: Mapping[PoolId, PoolOwner],
    transport: Transports,
    layer_groups: int,
) -> JaxEngine:
    """An engine of the same name, whose prefill steps are cut into so many layer groups."""
    programs = [
        program.cut(layer_groups) if isinstance(program, PrefillProgram) else program
        for program in engine.programs.values()
    ]
    pool = pools[engine.pool]
    threads = engine.worker, engine.ahead
    return JaxEngine(engine.id, engine.pool, pool, programs, transport, *threads)


def build_engines(
    config: Config,
    spec: ModelSpec,
    context: int,
    checkpoint: Checkpoint | None,
    progress: Progress | None = None,
) -> Engines:
    """Meshes, weights, pools and steps of `config`.

    Args:
      config: the run.
      spec: the model's shapes.
      context: longest sequence served, tokens.
      checkpoint: where the weights are; None makes random ones.
      progress: is told; None tells nobody.

    Raises:
      ValueError: a layout that cannot work, pools for which there is no memory even without
        weights, or a setting of JAX that holds in this thread alone; nothing has been loaded then.
        Or, after that, too little memory for a pool.
    """
    _check_settings()
    for_prefill, for_decode = deal_devices(config)
    builder = _Builder(config, spec, context, checkpoint, progress or Progress(False))
    if config.colocated:
        owned = builder.own([builder.both(Role.PREFILL, devices) for devices in for_prefill])
        prefilling = decoding = _named("hbm/", owned)
    else:
        sources = [builder.source(devices) for devices in for_prefill]
        targets = [builder.target(devices) for devices in for_decode]
        owned = builder.own(sources, targets)
        prefilling = _named("hbm/prefill-", owned[: len(sources)])
        decoding = _named("hbm/decode-", owned[len(sources) :])
    pools = {name: pool for name, (pool, _) in {**prefilling, **decoding}.items()}
    workers = Workers(config, for_prefill)
    if config.colocated:  # what a replica has prefilled it decodes
        transport = Transports([])
    else:
        transport = connect(pools, config.handoff.wire_dtype, workers)
    flexible = decoding if config.decode_is_flexible else {}
    ends = [*prefilling, *flexible], [*decoding, *prefilling]
    groups = choose_groups(config, spec, transport, pools, *ends)

    made: list[tuple[Role, PoolId, Sequence[Program]]]
    if config.colocated and config.prefill.mixed_budget is not None:
        made = [(Role.MIXED, name, builder.all(*each, 1)) for name, each in decoding.items()]
    else:
        made = [
            (Role.PREFILL, name, builder.prefilling(*each, groups[name]))
            for name, each in prefilling.items()
        ]
        made += [
            (Role.DECODE, name, builder.decoding(*each, groups.get(name, 1)))
            for name, each in decoding.items()
        ]
    numbers, roles = defaultdict[Role, Iterator[int]](count), dict[EngineId, Role]()
    engines: list[JaxEngine] = []
    for role, name, programs in made:
        id = EngineId(f"{role.value}/{next(numbers[role])}")
        worker = workers.of(pools[name].mesh.devices.flat)
        given = id, name, pools[name], programs, transport, worker, workers.ahead
        engines.append(JaxEngine(*given))
        roles[id] = role
    on_host_cores = jax.default_backend() == "cpu"
    return Engines(engines, roles, transport, pools, workers, on_host_cores)


Owned = tuple[PoolOwner, Params]
"""A pool, and the weights of the engines that keep their pages there."""


def _named(prefix: str, owned: Sequence[Owned]) -> dict[PoolId, Owned]:
    """By the names of the pools, which are numbered."""
    return {PoolId(f"{prefix}{i}"): each for i, each in enumerate(owned)}


class _Builder:
    """Makes the parts of a run. Weights come before pools, which take what memory they leave."""

    def __init__(
        self,
        config: Config,
        spec: ModelSpec,
        context: int,
        checkpoint: Checkpoint | None,
        progress: Progress,
    ) -> None:
        self._config, self._spec, self._context = config, spec, context
        self._checkpoint, self._progress = checkpoint, progress
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

    def source(self, devices: Sequence[jax.Device]) -> Claim:
        """The pool of a prefill engine."""
        if self._config.prefill_is_flexible:
            return self.both(Role.PREFILL, devices)
        fixed = self._config.prefill.pages is not None
        return self._claim(
            "prefill.pages", fixed, self._prefill_pages, self._prefill_layout, devices
        )

    def target(self, devices: Sequence[jax.Device]) -> Claim:
        """The pool of a decode engine."""
        if self._config.decode_is_flexible:
            return self.both(Role.DECODE, devices)
        fixed = self._config.decode.pages is not None
        return self._claim("decode.pages", fixed, self._decode_pages, self._decode_layout, devices)

    def both(self, role: Role, devices: Sequence[jax.Device]) -> Claim:
        """A pool with the pages of both ends and one null page, laid out as for the role."""
        sides = {"prefill.pages": self._config.prefill.pages}
        sides["decode.pages"] = self._config.decode.pages
        left_open = [name for name, pages in sides.items() if not pages]
        field = " and ".join(left_open or sides)
        pages = self._prefill_pages + self._decode_pages - 1
        layout = self._prefill_layout if role is Role.PREFILL else self._decode_layout
        claim = self._claim(field, not left_open, pages, layout, devices)
        if len(left_open) != 1:
            return claim
        part = next((name, said) for name, said in sides.items() if said)
        return replace(claim, part=part)

    def own(self, sources: Sequence[Claim], targets: Sequence[Claim] = ()) -> list[Owned]:
        """Load the weights of all engines, then lay out their pools in what memory is left: those
        of several engines may share a device, or the memory of the host."""
        claims, fraction = [*sources, *targets], self._config.kv.memory_fraction
        deal_pages(claims, fraction)  # what fits not even without weights is refused at once
        rules = [self._prefill_rules] * len(sources) + [self._decode_rules] * len(targets)
        meshes = [make_mesh(each.devices, each.layout.stages, each.layout.tp) for each in claims]
        weights = self._all_weights(claims, meshes, rules)
        # Whatever else loading took must be free again, or it would be missing for good.
        jax.block_until_ready(weights)
        pages = deal_pages(claims, fraction)
        return [
            (PoolOwner(claims[i].layout, pages[i], meshes[i], rules[i]), weights[i])
            for i in range(len(claims))
        ]

    def _all_weights(
        self, claims: Sequence[Claim], meshes: Sequence[Mesh], rules: Sequence[Rules]
    ) -> list[Params]:
        """The weights of each engine. They are read, or drawn, once for all meshes that cut them
        alike, and copied from device to device."""
        made: list[Params] = []
        alike: dict[Any, Params] = {}
        for claim, mesh, its_rules in zip(claims, meshes, rules, strict=True):
            layout = claim.layout
            axes = None if mesh.size == 1 else tuple(sorted(its_rules.items()))  # one has it whole
            key = layout.stages, layout.tp, axes
            if key not in alike:
                alike[key] = self._weights(mesh, its_rules, layout)
                made.append(alike[key])
                continue
            with self._progress.phase("copying weights"):
                stages, first = layout.stage_layers, alike[key]
                made.append(copied_params(first, self._spec, mesh, its_rules, stages))
        return made

    def _claim(
        self,
        field: str,
        fixed: bool,
        pages: int,
        layout: KVLayout,
        devices: Sequence[jax.Device],
    ) -> Claim:
        return Claim(field, fixed, pages, layout, self._context, devices)

    def prefill(self, pool: PoolOwner, params: Params, groups: int) -> PrefillProgram:
        """Prefill steps over a pool, cut into `groups` layer groups."""
        return PrefillProgram(
            params,
            self._spec,
            pool,
            max_logprobs=self._config.max_logprobs,
            layer_groups=groups,
        )

    def decode(self, pool: PoolOwner, params: Params) -> DecodeProgram:
        """Decode ticks over a pool."""
        return DecodeProgram(
            params,
            self._spec,
            pool,
            rows=self._config.decode.rows,
            context=self._context,
            max_logprobs=self._config.max_logprobs,
            attention=self._config.decode.attention,
        )

    def prefilling(self, pool: PoolOwner, params: Params, groups: int) -> Sequence[Program]:
        """The programs of a prefill engine."""
        if self._config.prefill_is_flexible:
            return self.all(pool, params, groups)
        return [self.prefill(pool, params, groups)]

    def decoding(self, pool: PoolOwner, params: Params, groups: int) -> Sequence[Program]:
        """The programs of a decode engine; `groups` of its prefill steps, where it has them."""
        if self._config.decode_is_flexible:
            return self.all(pool, params, groups)
        return [self.decode(pool, params)]

    def all(self, pool: PoolOwner, params: Params, groups: int) -> Sequence[Program]:
        """Steps of both kinds over a pool, and mixed ones."""
        chunks, rows = self.prefill(pool, params, groups), self.decode(pool, params)
        attention = self._config.decode.attention
        return (
            chunks,
            rows,
            MixedProgram(chunks, rows, params, self._spec, pool, attention=attention),
        )

    def _whole_contexts(self, layout: KVLayout, sequences: int) -> int:
        """Pages for so many sequences of the longest kind, and the null page; at most as many as
        have slots that 32 bits can count."""
        wanted = 1 + sequences * layout.pages_for(self._context)
        return min(wanted, (2 * MOST_TOKENS - 1) // layout.page_size)

    def _weights(self, mesh: Mesh, rules: Rules, layout: KVLayout) -> Params:
        spec, layers, dtype = self._spec, layout.stage_layers, self._config.model.dtype
        if self._checkpoint is None:
            with self._progress.phase("drawing weights"):
                return random_params(spec, mesh, rules, layers, dtype, self._config.seed)
        return load_params(self._checkpoint, mesh, rules, layers, dtype, self._progress)


@contextmanager
def _fields_of(owner: str) -> Iterator[None]:
    """What is wrong with a layout names a field of its own; here it is one of the config."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{owner}.{error}") from error


def _check_settings() -> None:
    """Programs are compiled, and called, in several threads, also after this one has gone on."""
    if own := settings_of_this_thread():
        raise ValueError(
            f"{', '.join(own)}: holds in this thread alone, as a `with` block of JAX sets it; the "
            "programs of engines are compiled and called in others, too. Set it with "
            "jax.config.update before the engines are built"
        )


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
