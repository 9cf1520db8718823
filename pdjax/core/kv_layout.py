"""KVLayout: the single truth about a page of KV cache: its shape, its bytes, and who holds which
part of it.

A pool keeps, for each layer, two arrays of pages (K and V apart), `[K, P, S, H]`: KV heads, pages,
tokens in a page, head dim. Beside elements of a quantised type lies a float32 scale for each token
and head, `[K, P, S]`. Heads are sharded over `tp`; layers are dealt out to `stage`s.
Everything that touches KV (kernels, pools, the hand-off, tiers) takes its geometry from here, and
addresses a piece by its *global* layer index and its *global* KV head, never by its place inside a
shard.
"""

from dataclasses import dataclass
from math import lcm

NULL_PAGE = 0
"""Page 0 of every pool: padding writes there, nobody reads it, no allocator hands it out."""


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
class KVLayout:
    """Where the KV cache of a model lives on one mesh.

    Attributes:
      num_layers: layers of the model, L.
      kv_heads: KV heads of the model, K, over all shards.
      head_dim: H.
      page_size: tokens a page, S.
      dtype: name of the element type, such as "float32".
      itemsize: bytes an element.
      stages: pipeline stages; 1 on a prefill mesh.
      tp: shards of the KV heads within a stage.
    """

    num_layers: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: str
    itemsize: int
    stages: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        split_layers(self.num_layers, self.stages)
        if self.tp < 1 or self.kv_heads % self.tp:
            divisors = [n for n in range(1, self.kv_heads + 1) if self.kv_heads % n == 0]
            raise ValueError(
                f"tp={self.tp}: does not divide the model's {self.kv_heads} KV heads; "
                f"allowed: {divisors}"
            )
        if self.page_size < 1:
            raise ValueError(f"page_size={self.page_size}: must be at least 1 token")

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
    def full_slots(self) -> int:
        """Layer slots that hold a real layer on *every* stage."""
        return len(self.stage_layers[-1])

    @property
    def local_heads(self) -> int:
        """KV heads of one shard."""
        return self.kv_heads // self.tp

    @property
    def quantised(self) -> bool:
        """Whether elements have scales."""
        return self.dtype in QUANTISED_DTYPES

    @property
    def head_bytes(self) -> int:
        """Bytes of one token and KV head, K or V, with its scale if it has one."""
        return self.head_dim * self.itemsize + 4 * self.quantised

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers and heads, K and V together."""
        return 2 * self.num_layers * self.kv_heads * self.page_size * self.head_bytes

    @property
    def device_page_bytes(self) -> int:
        """Bytes of one page on one device: the layer slots of a stage, empty ones too, and the
        heads of a shard."""
        heads = self.slots * self.local_heads
        return 2 * heads * self.page_size * self.head_bytes

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    def head_unit(self, other: "KVLayout") -> int:
        """KV heads of the largest piece that lies within one shard here and within one shard of
        `other`."""
        return self.kv_heads // lcm(self.tp, other.tp)

    def span(self, other: "KVLayout") -> int:
        """Tokens of the shortest run that is whole pages here and in `other`."""
        return lcm(self.page_size, other.page_size)

    def check_same_kv(self, other: "KVLayout") -> None:
        """Refuse a hand-off to `other` where KV of one cannot be made that of the other. Pages may
        differ in size and in element type.

        Raises:
          ValueError: naming the field that differs.
        """
        for field in ("num_layers", "kv_heads", "head_dim"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                raise ValueError(
                    f"{field}: the sending pool has {mine}, the receiving pool {theirs}; "
                    "they must agree"
                )
