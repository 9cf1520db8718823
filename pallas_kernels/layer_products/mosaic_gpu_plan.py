"""How the products of a layer are cut into work for blocks of threads that stay.

A block reads the weights of one product after another through one ring. A stage of the ring holds
two boxes of 64 x 128 weights, 32 KB: of gate and of up, of columns side by side, or of rows below
one another. A unit of work is what a block sums up for a tile of columns: over the whole depth, or,
where columns are few, over a part of it.
"""

from dataclasses import dataclass
from functools import cached_property

from jax.experimental import pallas as pl

from pallas_kernels.hopper import PROCESSORS, ROWS

DEPTH = 64  # of a box
COLUMNS = 128  # of a box
BOXES = 2  # of a stage
_MOST_SPLITS = 5
_ROUND = 4  # a cluster's worth of processors: 128 of 132 divide most models' columns


@dataclass(frozen=True)
class Product:
    """One of a layer's products, as it is cut."""

    depth: int
    columns: int  # of a side
    sides: int = 1
    deep: bool = False
    """A stage's boxes lie below one another, not side by side."""
    splits: int = 1
    """Parts that the depth is cut into; their sums are added in another step."""

    @property
    def width(self) -> int:
        """Columns of a tile, of each side."""
        return COLUMNS if self.deep or self.sides == BOXES else BOXES * COLUMNS

    @property
    def below(self) -> int:
        """Boxes of a stage that lie below one another."""
        return BOXES if self.deep else 1

    @property
    def units(self) -> int:
        """Of work."""
        return self.columns // self.width * self.splits

    @property
    def steps(self) -> int:
        """Stages over the whole depth."""
        return self.depth // (self.below * DEPTH)

    def blocks(self, most: int) -> int:
        """Blocks of threads that have work, of so many."""
        return min(self.units, most)

    def longest(self, blocks: int) -> int:
        """Stages that the busiest of so many blocks reads."""
        return pl.cdiv(self.units, blocks) * pl.cdiv(self.steps, self.splits)


def cut(depth: int, columns: int, blocks: int) -> Product | None:
    """A product of one side, cut so that the busiest block reads least, and then into fewest parts;
    None where no cut fits."""
    cuts = [
        Product(depth, columns, deep=deep, splits=splits)
        for deep in (True, False)
        for splits in range(1, _MOST_SPLITS + 1)
    ]
    fitting = [
        x
        for x in cuts
        if columns % x.width == 0 and depth % (depth // x.steps) == 0 and x.splits <= x.steps
    ]
    return min(fitting, key=lambda x: (x.longest(blocks), x.splits), default=None)


@dataclass(frozen=True)
class Plan:
    """What is known of a launch before it is traced."""

    rows: int
    heads_dim: int  # N * H: of the attention's output
    model_dim: int
    mlp_dim: int
    qkv_dim: int  # columns of the next layer's first product; 0: there is none
    eps: float
    blocks: int = PROCESSORS - _ROUND
    stages: int | None = None
    """Of the weights' ring; None: as many as shared memory has room for."""
    x_stages: int | None = None
    """Of the activations' ring; None: as many as shared memory has room for."""
    fused: bool = True
    """One kernel for all, in which blocks wait for one another, as it should be. Pallas'
    interpreter runs blocks one by one; there each step is a kernel."""

    @cached_property
    def products(self) -> tuple[Product, ...]:
        """Output, gate and up, down and, if there is one, the next layer's QKV."""
        one_side = [(self.heads_dim, self.model_dim), (self.mlp_dim, self.model_dim)]
        if self.qkv_dim:
            one_side.append((self.model_dim, self.qkv_dim))
        output, *others = (cut(*sizes, self.blocks) for sizes in one_side)
        assert output is not None and None not in others
        return (output, Product(self.model_dim, self.mlp_dim, sides=2), *others)  # type: ignore[arg-type]

    @property
    def steps(self) -> tuple[tuple[str, int], ...]:
        """What is done, in order: "product" or "sum" and the index of the product."""
        return tuple(
            (kind, i)
            for i in range(len(self.products))
            for kind in (("product",) if i == 1 else ("product", "sum"))
        )

    def arrivals(self, kind: str, index: int) -> int:
        """Warpgroups that say so when they are done with a step."""
        if kind == "product":
            return self.products[index].blocks(self.blocks) * self.computes
        return min(self.rows, self.blocks)

    @property
    def padded(self) -> int:
        """Rows that are copied."""
        return pl.cdiv(self.rows, 8) * 8

    @property
    def computes(self) -> int:
        """Warpgroups that compute."""
        return pl.cdiv(self.rows, ROWS)

    @property
    def tall(self) -> int:
        """Rows of those warpgroups."""
        return self.computes * ROWS

    @property
    def mine(self) -> int:
        """Rows that each of them has."""
        return min(self.padded, ROWS)

    @property
    def ring(self) -> int:
        """Stages of weights, as they are."""
        return self.stages or (5 if self.computes == 1 else 4)

    @property
    def x_ring(self) -> int:
        """Stages of activations, of 64 numbers each."""
        return self.x_stages or (4 if self.computes == 1 else 3)
