"""The config of a run: frozen dataclasses that check their fields when they are made.

`load.load_config` takes a Config, a preset's name, or a Python file with `get_config() -> Config`.
The file's docstring gives the command and the expected result.
"""

from dataclasses import dataclass, field, fields

from pdjax.config.checks import (
    MOST_DEVICES,
    MOST_LOGPROBS,
    MOST_LOOKAHEAD,
    MOST_PAGE_SIZE,
    MOST_QUEUED,
    MOST_ROWS,
    MOST_STEP_TOKENS,
    MOST_TOKENS,
    between,
    check_buckets,
    check_folder,
    check_slots,
    check_types,
    one_of,
)
from pdjax.config.handoff import HandoffConfig
from pdjax.config.kv import DTYPES, KVConfig
from pdjax.config.policies import PoliciesConfig
from pdjax.config.roles import RolesConfig
from pdjax.config.tiers import TiersConfig
from pdjax.core.kv_layout import QUANTISED_DTYPES
from pdjax.core.messages import shown
from pdjax.core.model_spec import ModelSpec

RANDOM = "random"
"""The `model.source` that makes random weights with the shapes of `model.spec`."""

NO_CACHE = "off"
"""The `compilation_cache` that keeps no programs."""

EXPERTS = ("split", "whole")
"""How `tp` shards the experts of a model that has some."""

FLEXIBLE = ("none", "decode", "all")
"""The engines of `flexible`."""


@dataclass(frozen=True)
class ModelConfig:
    """The model and its precision.

    Attributes:
      source: name of an embedded model, a .gguf file, a Hugging Face directory, an id of the
        Hugging Face Hub, a checkpoint of `pdjax convert`, or "random"; a Path becomes a string.
      dtype: type of weights and activations, "float32" or "bfloat16".
      max_model_len: longest sequence served, prompt and output together, tokens; None takes the
        model's own context.
      spec: the shapes of a "random" model; None otherwise.
    """

    source: str = "smollm2-135m-instruct"
    dtype: str = "float32"
    max_model_len: int | None = None
    spec: ModelSpec | None = None

    def __post_init__(self) -> None:
        check_types("model", self)
        one_of("model.dtype", self.dtype, DTYPES)
        between("model", self, 2, MOST_TOKENS, "max_model_len")
        if (self.source == RANDOM) != (self.spec is not None):
            raise ValueError(
                f'model.spec={self.spec}: needed where model.source="{RANDOM}", and only there; '
                f"model.source={shown(self.source)}"
            )


@dataclass(frozen=True)
class PrefillConfig:
    """The prefill engines.

    Attributes:
      engines: independent engines, each on its own mesh.
      tp: tensor-parallel shards of an engine; must divide the model's KV heads.
      experts: how shards hold the experts of a model. "split": each has a part of every expert, and
        all have equal work. "whole": experts are dealt out, and products are larger.
      pages: pages of an engine's pool, null page included; None sizes it for `max_sequences` whole
        contexts of each step that may be dispatched, `1 + lookahead`, or for what the device's
        memory holds, if that is less: see kv.memory_fraction.
      token_budget: most tokens packed into one step, over all its prompts.
      mixed_budget: most tokens of prompts in a step that also decodes, of colocated and flexible
        engines: chunks and rows are computed together then, as in Sarathi-Serve. None gives each a
        step of its own, in turn, with colocated=True.
      max_sequences: most prompts packed into one step.
      lookahead: steps dispatched beyond the one that runs.
      token_buckets: padded sizes of a step in tokens; None takes `token_budget`, a fourth of it,
        and so on.
      page_buckets: padded sizes of a step in pages read; None takes the pages of the longest
        context or of a full budget, a sixteenth of them, and so on down to 256.
      dispatch_thread: dispatch each engine's steps on a thread of its own, so that decode does not
        wait for a prefill dispatch. None does so where an engine shares no device with decode and
        its devices are not the host's own cores.
    """

    engines: int = 1
    tp: int = 1
    experts: str = "split"
    pages: int | None = None
    token_budget: int = 512
    mixed_budget: int | None = None
    max_sequences: int = 8
    lookahead: int = 1
    token_buckets: tuple[int, ...] | None = None
    page_buckets: tuple[int, ...] | None = None
    dispatch_thread: bool | None = None

    def __post_init__(self) -> None:
        check_types("prefill", self)
        between("prefill", self, 1, MOST_DEVICES, "engines", "tp")
        one_of("prefill.experts", self.experts, EXPERTS)
        between("prefill", self, 1, MOST_STEP_TOKENS, "token_budget", "mixed_budget")
        between("prefill", self, 1, MOST_ROWS, "max_sequences")
        between("prefill", self, 2, 2 * MOST_TOKENS - 1, "pages")
        between("prefill", self, 0, MOST_LOOKAHEAD, "lookahead")
        check_buckets("prefill.token_buckets", self.token_buckets, MOST_STEP_TOKENS)
        check_buckets("prefill.page_buckets", self.page_buckets, MOST_TOKENS)
        if self.mixed_budget is not None and self.mixed_budget > self.token_budget:
            raise ValueError(
                f"prefill.mixed_budget={self.mixed_budget}: must be at most "
                f"prefill.token_budget={self.token_budget}"
            )
        if self.token_buckets is not None and self.token_buckets[-1] < self.token_budget:
            raise ValueError(
                f"prefill.token_buckets={shown(self.token_buckets)}: the largest must hold "
                f"prefill.token_budget={self.token_budget}"
            )


@dataclass(frozen=True)
class DecodeConfig:
    """The decode engines.

    Attributes:
      engines: independent engines, each on its own mesh.
      stages: pipeline stages of an engine; need not divide the layers evenly.
      tp: tensor-parallel shards of a stage; must divide the model's KV heads.
      experts: how the shards of a stage hold experts, as prefill.experts says.
      rows: most sequences that an engine decodes at once; a multiple of `stages`, since the engine
        splits its rows evenly into one microbatch a stage.
      pages: pages of an engine's pool, null page included; None sizes it for `rows` whole contexts,
        or for what the device's memory holds, if that is less: see kv.memory_fraction.
      lookahead: ticks dispatched beyond the tick that the host reads tokens of.
      row_buckets: numbers of rows that a tick may compute of each microbatch, beside all of them:
        it computes the fewest that hold the active ones. None takes 1, 8, 16, 32, and so on where a
        microbatch has 16 rows or more, else all.
      page_buckets: padded widths of the page table; None takes the pages of the longest context, a
        fourth of them, and so on down to 256 tokens.
      attention: name of an `append_attention` implementation; None lets pallas_kernels choose for
        the platform.
      page_size: tokens a page of the decode pools; None takes kv.page_size. Any other size must
        divide kv.page_size or be a multiple of it; a hand-off converts the pages.
      kv_dtype: type of the decode pools: "float32", "bfloat16", or "int8" or "float8_e4m3fn" with a
        scale a token and head; None takes kv.dtype. A hand-off converts to any other type.
    """

    engines: int = 1
    stages: int = 1
    tp: int = 1
    experts: str = "split"
    rows: int = 8
    pages: int | None = None
    lookahead: int = 1
    row_buckets: tuple[int, ...] | None = None
    page_buckets: tuple[int, ...] | None = None
    attention: str | None = None
    page_size: int | None = None
    kv_dtype: str | None = None

    def __post_init__(self) -> None:
        check_types("decode", self)
        between("decode", self, 1, MOST_DEVICES, "engines", "stages", "tp")
        one_of("decode.experts", self.experts, EXPERTS)
        between("decode", self, 1, MOST_ROWS, "rows")
        between("decode", self, 1, MOST_PAGE_SIZE, "page_size")
        if self.kv_dtype is not None:
            one_of("decode.kv_dtype", self.kv_dtype, DTYPES + QUANTISED_DTYPES)
        between("decode", self, 2, 2 * MOST_TOKENS - 1, "pages")
        between("decode", self, 0, MOST_LOOKAHEAD, "lookahead")
        check_buckets("decode.row_buckets", self.row_buckets, MOST_ROWS)
        check_buckets("decode.page_buckets", self.page_buckets, MOST_TOKENS)
        if self.rows % self.stages:
            raise ValueError(
                f"decode.rows={self.rows}: must be a multiple of decode.stages={self.stages}, "
                "since each of as many microbatches holds its share of the rows"
            )


@dataclass(frozen=True)
class Config:
    """A whole run.

    Attributes:
      model, kv, prefill, decode, handoff, tiers, policies, roles: the parts; see their classes.
      colocated: prefill and decode on the same mesh and pool (the rival that disaggregation is
        measured against). A hand-off moves ownership, not bytes. Needs equal tp, and decode engines
        of one stage, as many as prefill engines: several are replicas, each with a mesh and a pool,
        behind the router. None does so where there are too few devices.
      flexible: engines that accept all kinds of steps (prefill, decode and mixed) over pools of
        their own: "none"; "decode", the decode engines, so that the placement policy may let a
        sequence be prefilled where it decodes; or "all", so that the prefill engines can decode,
        too. Each engine begins in its own role, and KV can move between any two pools. A flexible
        engine's pool has the pages of both sections. Needs prefill.mixed_budget, decode.stages=1,
        and decode pools of the page size and type of the prefill pools; tp may differ. Not with
        colocated=True, where engines do both anyway.
      shared_devices: give the same devices to the prefill engines and to the decode engines; each
        engine has its own weights and pool. Lets tensor-parallel prefill and pipelined decode both
        use all devices.
      max_waiting: most requests in the waiting queue; one more is refused.
      max_logprobs: most alternatives that a request may ask for.
      max_recorded: most finished requests on record for metrics and traces, with 1,000 tokens
        each on average, ten times as many steps and moments of free pages, and five times as many
        shipments; the oldest are dropped. A request takes about 1.4 kB, a token 8 bytes, a step
        0.5 kB, a shipment 0.7 kB: 10,000 take at most 200 MB. Totals cover the whole run.
      cpu_devices: virtual devices where JAX runs on the CPU; None: as many as the meshes need.
      warm_up: compile every bucket before the first request.
      compilation_cache: folder that keeps compiled programs, and on GPUs XLA's autotuning, for
        the next start; applies to the whole process. "off" keeps none. None leaves what
        JAX_COMPILATION_CACHE_DIR or jax.config say, else takes `pdjax/jax` in $XDG_CACHE_HOME
        (~/.cache), at most 8 GiB. Steps that need not be traced again are in its folder `pdjax`,
        at most 8 GiB more; PDJAX_KEEP_PROGRAMS=0 keeps none, and a folder that other users own or
        may write is not used, since what is in it is run. It may be deleted at any time.
      seed: seeds random weights, and the seeds that are drawn for requests which name none; in
        [0, 2**32).
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    kv: KVConfig = field(default_factory=KVConfig)
    prefill: PrefillConfig = field(default_factory=PrefillConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    handoff: HandoffConfig = field(default_factory=HandoffConfig)
    policies: PoliciesConfig = field(default_factory=PoliciesConfig)
    roles: RolesConfig = field(default_factory=RolesConfig)
    tiers: TiersConfig = field(default_factory=TiersConfig)
    colocated: bool | None = False
    flexible: str = "none"
    shared_devices: bool = False
    max_waiting: int = 1024
    max_logprobs: int = 20
    max_recorded: int = 10_000
    cpu_devices: int | None = None
    warm_up: bool = True
    compilation_cache: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types("", self)
        between("", self, 1, MOST_QUEUED, "max_waiting", "max_recorded")
        between("", self, 1, MOST_DEVICES, "cpu_devices")
        between("", self, 0, MOST_LOGPROBS, "max_logprobs")
        check_folder("compilation_cache", self.compilation_cache, NO_CACHE)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={shown(self.seed)}: must be in [0, 2**32)")
        if self.devices > MOST_DEVICES:
            raise ValueError(
                f"prefill.engines and decode.engines: their meshes need {self.devices} devices; "
                f"must be at most {MOST_DEVICES}"
            )
        check_slots("prefill.pages", self.prefill.pages, self.kv.page_size)
        check_slots("decode.pages", self.decode.pages, self.decode_page_size)
        self._check_handoff()
        if self.tiers.host_gb is not None and not self.kv.prefix_cache:
            raise ValueError(
                f"tiers.host_gb={self.tiers.host_gb}: needs kv.prefix_cache=True, whose pages it "
                "takes in"
            )
        if self.prefill.dispatch_thread and (self.colocated or self.shared_devices):
            raise ValueError(
                "prefill.dispatch_thread=True: needs devices that decode does not use, so neither "
                "colocated nor shared_devices: two threads would start programs there in any order"
            )
        if self.colocated and self.shared_devices:
            raise ValueError(
                "shared_devices=True: is for separate engines; with colocated=True there is one"
            )
        self._check_flexible()
        if self.colocated:
            p, d = self.prefill, self.decode
            if (p.engines, p.tp, p.experts, 1) != (d.engines, d.tp, d.experts, d.stages):
                raise ValueError(
                    "colocated=True: needs prefill.engines=decode.engines, decode.stages=1 and "
                    "equal tp and experts, but has "
                    f"{p.engines} and {d.engines}, {d.stages}, {p.tp} and {d.tp}, and "
                    f"{p.experts!r} and {d.experts!r}"
                )

    def _check_flexible(self) -> None:
        one_of("flexible", self.flexible, FLEXIBLE)
        if not self.decode_is_flexible:
            return
        size, own = self.kv.page_size, self.decode_page_size
        dtype, other = self.kv.dtype or self.model.dtype, self.decode.kv_dtype
        for wrong, needs, has in (
            (self.colocated, "colocated=False", "True"),
            (self.prefill.mixed_budget is None, "a prefill.mixed_budget", "None"),
            (self.decode.stages > 1, "decode.stages=1, as mixed steps do", self.decode.stages),
            (own != size, f"decode.page_size to be None or kv.page_size={size}", own),
            (other not in (None, dtype), f"decode.kv_dtype to be None or {dtype!r}", repr(other)),
        ):
            if wrong:
                raise ValueError(f"flexible={self.flexible!r}: needs {needs}, but that is {has}")

    def _check_handoff(self) -> None:
        size, own = self.kv.page_size, self.decode.page_size or self.kv.page_size
        if max(size, own) % min(size, own):
            raise ValueError(
                f"decode.page_size={own}: must divide kv.page_size={size} or be a multiple of it"
            )
        if self.handoff.give_back and not self.kv.prefix_cache:
            raise ValueError("handoff.give_back=True: needs kv.prefix_cache=True, to be of any use")
        same = self.decode.kv_dtype in (None, self.kv.dtype or self.model.dtype)
        if self.handoff.give_back and (self.handoff.wire_dtype or not same):
            raise ValueError(
                f"handoff.give_back=True: with handoff.wire_dtype={self.handoff.wire_dtype!r}, "
                f"decode.kv_dtype={self.decode.kv_dtype!r} rounded KV would come back; the former "
                "must be None, the latter None or the prefill side's"
            )
        self._check_rounding()
        left = self.handoff.where_nothing_moves if self.colocated else self.handoff
        for each in fields(left):
            value, usual = getattr(self.handoff, each.name), getattr(left, each.name)
            if value != usual:
                raise ValueError(
                    f"handoff.{each.name}={value!r}: must be {usual!r} with colocated=True, where "
                    "nothing moves and it would have no effect"
                )
        if self.colocated and (self.decode.page_size or self.decode.kv_dtype):
            raise ValueError(
                f"decode.page_size={self.decode.page_size}, decode.kv_dtype="
                f"{self.decode.kv_dtype!r}: must be None with colocated=True, where both phases "
                "share a pool, and prefill attention reads no quantised pages"
            )

    def _check_rounding(self) -> None:
        wire, own = self.handoff.wire_dtype, self.decode.kv_dtype
        if own in QUANTISED_DTYPES and wire not in (None, own):
            raise ValueError(
                f"handoff.wire_dtype={wire!r}: must be None or {own!r} with decode.kv_dtype="
                f"{own!r}, whose pages travel with the scales that they keep"
            )

    @property
    def decode_is_flexible(self) -> bool:
        """Whether decode engines accept all kinds of steps."""
        return self.flexible != "none"

    @property
    def prefill_is_flexible(self) -> bool:
        """Whether prefill engines accept all kinds of steps."""
        return self.flexible == "all"

    @property
    def decode_page_size(self) -> int:
        """Tokens a page in the decode pools."""
        return self.decode.page_size or self.kv.page_size

    @property
    def devices(self) -> int:
        """Number of devices that the meshes need."""
        prefill = self.prefill.engines * self.prefill.tp
        decode = self.decode.engines * self.decode.stages * self.decode.tp
        if self.colocated:
            return prefill
        return max(prefill, decode) if self.shared_devices else prefill + decode
