"""From a config to engines: lays out pools, loads weights, connects pools; compiles no steps."""

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count
from operator import ge
from typing import Any

import jax
from jax.sharding import Mesh

from pdjax.config import USUAL_FRACTION, Config, HandoffConfig
from pdjax.core.ids import EngineId, PoolId
from pdjax.core.kv_layout import KVLayout
from pdjax.core.model_spec import ModelSpec
from pdjax.core.progress import Progress
from pdjax.core.roles import Role
from pdjax.device.checkpoints.api import Checkpoint
from pdjax.device.claims import Claims, PoolClaim
from pdjax.device.compat import settings_of_this_thread
from pdjax.device.devices import Workers, deal_devices
from pdjax.device.engine import JaxEngine
from pdjax.device.kv.disk_tier import disk_pool
from pdjax.device.kv.pool import PoolOwner
from pdjax.device.kv.sizing import Claim, deal_pages, free_bytes
from pdjax.device.kv.transports import Transports
from pdjax.device.layer_groups import choose_groups
from pdjax.device.links import DISK, connect, disk_store, host_tiers
from pdjax.device.mesh import Rules, make_mesh
from pdjax.device.models.decoder import Params
from pdjax.device.models.fingerprint import fingerprint
from pdjax.device.models.weights import copied_params, load_params, random_params
from pdjax.device.needs import PlannedPool, in_flight_bytes, program_bytes, tier_bytes
from pdjax.device.programs.decode import DecodeProgram
from pdjax.device.programs.mixed import MixedProgram
from pdjax.device.programs.prefill import PrefillProgram
from pdjax.device.programs.program import Program
from pdjax.disk.slot_store import SlotStore
from pdjax.interfaces.steps import Step, StepKind
from pdjax.interfaces.transport import Pool

_LOG = logging.getLogger("pdjax")


Largest = Callable[[KVLayout, Collection[StepKind]], Iterable[Step]]
"""The largest steps of each of these kinds, over a pool of this layout."""


@dataclass(frozen=True)
class Engines:
    """The device column of a deployment, ready to be driven through the door.

    Attributes:
      engines: all of them, those that prefill first.
      roles: of each at the start.
      transport: between their pools.
      pools: by their names.
      workers: of their devices.
      tiers: pools that no engine has; the transport holds them.
      disk: the store of the one on a disk.
      on_host_cores: whether the devices are the cores that the host itself needs.
    """

    engines: list[JaxEngine]
    roles: dict[EngineId, Role]
    transport: Transports
    pools: dict[PoolId, PoolOwner]
    workers: Workers
    on_host_cores: bool
    tiers: tuple[Pool, ...] = ()
    disk: SlotStore | None = None

    def handing_over(self, handoff: HandoffConfig, layer_groups: int) -> "Engines":
        """Engines over the same weights, pools and workers, whose prefill steps are cut into so
        many layer groups, and whose KV travels as `handoff` says; without tiers. Of both, one at a
        time is asked anything; what is left in pages is left there."""
        transport = connect(self.pools, handoff.wire_dtype, self.workers)
        engines = [_recut(each, self.pools, transport, layer_groups) for each in self.engines]
        return replace(self, engines=engines, transport=transport, tiers=(), disk=None)

    def close(self) -> None:
        """Wait until everything that engines were asked has been dispatched, then let go of their
        devices' memory. No engine is asked anything from then on; a second call does nothing."""
        with ExitStack() as closing:  # all of them, also if one is interrupted
            closing.callback(self.transport.close)
            for each in reversed(self.engines):
                closing.callback(each.close)


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
    largest: Largest | None = None,
) -> Engines:
    """Meshes, weights, pools and steps of `config`.

    Args:
      config: the run.
      spec: the model's shapes.
      context: longest sequence served, tokens.
      checkpoint: where the weights are; None makes random ones.
      progress: is told; None tells nobody.
      largest: the steps by which pools are sized where kv.memory_fraction is None; None has none,
        so that the pools take `USUAL_FRACTION`.

    Raises:
      ValueError: a layout that cannot work, pools or a tier for which there is no memory even
        without weights, or a setting of JAX that holds in this thread alone; nothing has been
        loaded then. Or, after that, too little memory for a pool, or a disk tier that cannot be
        opened.
    """
    with ExitStack() as undo:
        given = config, spec, context, checkpoint, progress or Progress(False), largest
        built = _build(*given, undo)
        undo.pop_all()
    return built


def _build(
    config: Config,
    spec: ModelSpec,
    context: int,
    checkpoint: Checkpoint | None,
    progress: Progress,
    largest: Largest | None,
    undo: ExitStack,
) -> Engines:
    """See `build_engines`; `undo` is what ends with an error."""
    _check_settings()
    for_prefill, for_decode = deal_devices(config)
    claims = Claims(config, spec, context).of(for_prefill, for_decode)
    tiers = host_tiers(config, claims[0].claim.layout)
    builder = _Builder(config, spec, context, checkpoint, progress, largest)
    owned = dict(zip([each.id for each in claims], builder.own(claims), strict=True))
    prefilling = {each.id: owned[each.id] for each in claims if each.role.prefills}
    decoding = {each.id: owned[each.id] for each in claims if each.role.decodes}
    pools = {name: pool for name, (pool, _) in owned.items()}
    workers = Workers(config, for_prefill)
    disk = None
    if tiers and config.tiers.disk_folder is not None:
        with progress.phase("opening the disk tier"):
            model = fingerprint(owned[claims[0].id][1], spec, config.model.dtype, config.prefill.tp)
            disk = disk_store(config.tiers, model, tiers[0].layout)
        undo.callback(disk.close)
    transport = connect(
        pools,
        config.handoff.wire_dtype,
        workers,
        tiers,
        disk,
        hands_off=not config.colocated,  # what a replica has prefilled it decodes
    )
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
    if disk is not None:
        tiers += (disk_pool(DISK, tiers[0].layout, disk),)
    return Engines(engines, roles, transport, pools, workers, on_host_cores, tiers, disk)


Owned = tuple[PoolOwner, Params]
"""A pool, and the weights of the engines that keep their pages there."""


class _Builder:
    """Makes the parts of a run. Weights come before pools, which take what memory they leave."""

    def __init__(
        self,
        config: Config,
        spec: ModelSpec,
        context: int,
        checkpoint: Checkpoint | None,
        progress: Progress,
        largest: Largest | None,
    ) -> None:
        self._config, self._spec, self._context = config, spec, context
        self._checkpoint, self._progress, self._largest = checkpoint, progress, largest

    def own(self, asked: Sequence[PoolClaim]) -> list[Owned]:
        """Load the weights of all engines, then lay out their pools in what memory is left: those
        of several engines may share a device, or the memory of the host."""
        claims, fraction = [each.claim for each in asked], self._config.kv.memory_fraction
        deal_pages(claims, fraction)  # what fits not even without weights is refused at once
        rules = [each.rules for each in asked]
        meshes = [make_mesh(each.devices, each.layout.stages, each.layout.tp) for each in claims]
        weights = self._all_weights(claims, meshes, rules)
        # Whatever else loading took must be free again, or it would be missing for good.
        jax.block_until_ready(weights)
        pages = deal_pages(claims, fraction)
        if fraction is None and self._largest is not None and any(map(self._is_sized, claims)):
            with self._progress.phase("sizing pools"):
                pages = self._sized(asked, meshes, weights, self._largest)
        return [
            (PoolOwner(claims[i].layout, pages[i], meshes[i], rules[i]), weights[i])
            for i in range(len(claims))
        ]

    def _is_sized(self, claim: Claim) -> bool:
        """Whether a pool's size is left open, and bound by memory that its devices report."""
        return not claim.fixed and free_bytes(claim.devices[0]) is not None

    def _sized(
        self,
        asked: Sequence[PoolClaim],
        meshes: Sequence[Mesh],
        weights: Sequence[Params],
        largest: Largest,
    ) -> list[int]:
        """The pages of each pool that leave what programs need. They are compiled for the pools
        that would fit if they needed nothing, and then for those that fit beside them, until these
        do not shrink any more; so what is compiled last is what serves."""
        claims = [replace(each.claim, needs=0) for each in asked]
        pages = deal_pages(claims, None)
        while True:
            needs: dict[Any, int | None] = {}  # of engines alike, once
            for i, each in enumerate(asked):
                key = each.role, claims[i].layout, pages[i]
                if key not in needs:
                    needs[key] = self._needs(each, pages[i], meshes[i], weights[i], largest)
                claims[i] = replace(claims[i], needs=needs[key])
            fitting = deal_pages(claims, None)
            if all(map(ge, fitting, pages)):
                return pages
            pages = [*map(min, fitting, pages)]

    def _needs(
        self, asked: PoolClaim, pages: int, mesh: Mesh, params: Params, largest: Largest
    ) -> int | None:
        """Bytes that the programs over a pool need on each of its devices, with KV in flight; None
        where the platform does not say, which a warning tells."""
        layout, handoff = asked.claim.layout, self._config.handoff
        pool = PlannedPool(layout, pages, mesh, asked.rules)
        programs: list[Program] = []
        groups = handoff.layer_groups or 1
        if asked.role is Role.MIXED and self._config.prefill.mixed_budget is not None:
            programs += self.all(pool, params, groups)
        else:
            programs += self.prefilling(pool, params, groups) if asked.role.prefills else ()
            programs += self.decoding(pool, params, groups) if asked.role.decodes else ()
        kinds = [each.kind for each in programs]
        found = program_bytes(programs, largest(layout, kinds))
        if found is None:
            _LOG.warning(
                "kv.memory_fraction=None: this platform does not say what programs need; pools "
                "take %s of the free memory",
                USUAL_FRACTION,
            )
            return None
        moving = 0
        if not self._config.colocated:
            moving = in_flight_bytes(layout, self._context, handoff.max_bytes_in_flight)
        if self._config.tiers.host_gb is not None:
            moving += tier_bytes(layout, self._config.tiers.bytes_in_flight)
        _LOG.info(
            "%s: programs take %.2f GB, KV in flight %.2f", asked.id, found / 1e9, moving / 1e9
        )
        return found + moving

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

    def prefill(self, pool: PoolOwner, params: Params, groups: int) -> PrefillProgram:
        """Prefill steps over a pool, cut into `groups` layer groups."""
        return PrefillProgram(
            params,
            self._spec,
            pool,
            max_logprobs=self._config.max_logprobs,
            layer_groups=groups,
            copies=self._config.kv.prefix_cache,
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

    def _weights(self, mesh: Mesh, rules: Rules, layout: KVLayout) -> Params:
        spec, layers, dtype = self._spec, layout.stage_layers, self._config.model.dtype
        if self._checkpoint is None:
            with self._progress.phase("drawing weights"):
                return random_params(spec, mesh, rules, layers, dtype, self._config.seed)
        return load_params(self._checkpoint, mesh, rules, layers, dtype, self._progress)


def _check_settings() -> None:
    """Programs are compiled, and called, in several threads, also after this one has gone on."""
    if own := settings_of_this_thread():
        raise ValueError(
            f"{', '.join(own)}: holds in this thread alone, as a `with` block of JAX sets it; the "
            "programs of engines are compiled and called in others, too. Set it with "
            "jax.config.update before the engines are built"
        )
