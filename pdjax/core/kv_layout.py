"""KVLayout: the single truth about a page of KV cache: its shape, its bytes, and who holds which
part of it.

A layer keeps one or more planes, such as K and V apart. A pool holds an array of pages for each
plane of each layer, `[K, P, S, H]`: heads, pages, tokens in a page, head dim. Beside elements of a
quantised type lies a float32 scale for each token and head, `[K, P, S]`. The heads of a plane are
sharded over `tp`, or whole on every shard; layers are dealt out to `stage`s. Everything that
touches KV (kernels, pools, the hand-off, tiers) takes its geometry from here, and addresses a piece
by its *global* layer index and its *global* head, never by its place inside a shard.
"""

from dataclasses import dataclass
from functools import cached_property
from math import lcm

NULL_PAGE = 0
"""Page 0 of every pool: padding writes there, no step reads it, no allocator hands it out."""


QUANTISED_DTYPES = ("int8", "float8_e4m3fn")
"""Types of elements that have scales, as `pallas_kernels.quantised` rounds to them."""


def split_layers(num_layers: int, stages: int) -> tuple[tuple[int, ...], ...]:
    """Deal `num_layers` out to `stages` as contiguous runs; the first `num_layers % stages` runs
    are one longer.

    Raises:
      ValueError: a stage would have no layer.
    """
    if not 1 <= stages <= num_layers:
        raise ValueError(
            f"stages={stages}: must be between 1 and the number of layers, {num_layers}, "
            "so that every stage holds at least one layer"
        )
    short, longer = divmod(num_layers, stages)
    runs, first = [], 0
    for stage in range(stages):
        size = short + (stage < longer)
        runs.append(tuple(range(first, first + size)))
        first += size
    return tuple(runs)


def split_groups(num_layers: int, groups: int) -> tuple[range, ...]:
    """Cut `num_layers` into contiguous groups, as equal as can be, of which the first are the
    longer ones.

    Raises:
      ValueError: a group would have no layer.
    """
    if not 1 <= groups <= num_layers:
        raise ValueError(
            f"layer_groups={groups}: must be between 1 and the number of layers, {num_layers}"
        )
    return tuple(range(run[0], run[-1] + 1) for run in split_layers(num_layers, groups))


@dataclass(frozen=True)
class KVPlane:
    """What a layer keeps of each token, in an array of its own.

    Attributes:
      name: such as "k".
      heads: over all shards.
      dim: elements of a head.
      sharded: whether tensor parallelism deals the heads out; if not, every shard has all of them.
    """

    name: str
    heads: int
    dim: int
    sharded: bool = True

    def local_heads(self, tp: int) -> int:
        """Heads of one of `tp` shards."""
        return self.heads // tp if self.sharded else self.heads

    def unit(self, tp: int, other_tp: int) -> int:
        """Heads of the largest piece that lies within one shard of either mesh."""
        return self.heads // lcm(tp, other_tp) if self.sharded else self.heads


Planes = tuple[KVPlane, ...]
"""Those of one layer."""


def k_and_v(heads: int, dim: int) -> Planes:
    """The planes of attention whose K and V have equal heads: the ones that kernels read."""
    return KVPlane("k", heads, dim), KVPlane("v", heads, dim)


@dataclass(frozen=True)
class KVLayout:
    """Where the KV cache of a model lives on one mesh.

    Attributes:
      planes: of each layer of the model.
      page_size: tokens a page, S.
      dtype: name of the element type, such as "float32".
      itemsize: bytes an element.
      stages: pipeline stages; 1 on a prefill mesh.
      tp: shards within a stage.
    """

    planes: tuple[Planes, ...]
    page_size: int
    dtype: str
    itemsize: int
    stages: int = 1
    tp: int = 1

    @classmethod
    def of_heads(
        cls,
        num_layers: int,
        kv_heads: int,
        head_dim: int,
        page_size: int,
        dtype: str,
        itemsize: int,
        stages: int = 1,
        tp: int = 1,
    ) -> "KVLayout":
        """That of a model each of whose layers keeps K and V of so many heads."""
        planes = (k_and_v(kv_heads, head_dim),) * num_layers
        return cls(planes, page_size, dtype, itemsize, stages, tp)

    def __post_init__(self) -> None:
        split_layers(self.num_layers, self.stages)
        for heads in dict.fromkeys(p.heads for layer in self.planes for p in layer if p.sharded):
            if self.tp < 1 or heads % self.tp:
                divisors = [n for n in range(1, heads + 1) if heads % n == 0]
                raise ValueError(
                    f"tp={self.tp}: does not divide the model's {heads} KV heads; "
                    f"allowed: {divisors}"
                )
        if self.page_size < 1:
            raise ValueError(f"page_size={self.page_size}: must be at least 1 token")

    @property
    def num_layers(self) -> int:
        """Layers of the model, L."""
        return len(self.planes)

    @property
    def stage_layers(self) -> tuple[tuple[int, ...], ...]:
        """Global layer indices held by each stage, in order."""
        return split_layers(self.num_layers, self.stages)

    @property
    def slots(self) -> int:
        """Layer slots of a stage's program: the layers of the longest stage. A shorter stage pads
        with identities."""
        return len(self.stage_layers[0])

    @property
    def slot_planes(self) -> tuple[Planes, ...]:
        """Planes of each layer slot: those of its layer on the first stage, and so on the others,
        since stages run one program."""
        return self.planes[: self.slots]

    @property
    def quantised(self) -> bool:
        """Whether elements have scales."""
        return self.dtype in QUANTISED_DTYPES

    def head_bytes(self, plane: KVPlane) -> int:
        """Bytes of one token and head of a plane, with its scale if it has one."""
        return plane.dim * self.itemsize + 4 * self.quantised

    @cached_property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers, planes and heads."""
        planes = [plane for layer in self.planes for plane in layer]
        return self.page_size * sum(p.heads * self.head_bytes(p) for p in planes)

    @cached_property
    def device_page_bytes(self) -> int:
        """Bytes of one page on one device: the layer slots of a stage, empty ones too, and the
        heads of a shard."""
        planes = [plane for layer in self.slot_planes for plane in layer]
        return self.page_size * sum(p.local_heads(self.tp) * self.head_bytes(p) for p in planes)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    def span(self, other: "KVLayout") -> int:
        """Tokens of the shortest run that is whole pages here and in `other`."""
        return lcm(self.page_size, other.page_size)

    def check_same_kv(self, other: "KVLayout") -> None:
        """Refuse a hand-off to `other` where KV of one cannot be made that of the other. Pages may
        differ in size and in element type.

        Raises:
          ValueError: naming the field that differs.
        """
        if self.num_layers != other.num_layers:
            raise ValueError(
                f"num_layers: the sending pool has {self.num_layers}, the receiving pool "
                f"{other.num_layers}; they must agree"
            )
        for layer, (mine, theirs) in enumerate(zip(self.planes, other.planes, strict=True)):
            if mine != theirs:
                raise ValueError(
                    f"planes of layer {layer}: the sending pool has {_shown(mine)}, the receiving "
                    f"pool {_shown(theirs)}; they must agree"
                )


def _shown(planes: Planes) -> str:
    return ", ".join(f"{plane.name} of {plane.heads} x {plane.dim}" for plane in planes)
