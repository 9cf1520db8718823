"""Products of tokens with the weights of their groups: the experts of a mixture.

A token that goes through several experts is a row of each one's group. The rows are sorted by
group, and groups have any sizes, so that no token is dropped and none is padded (MegaBlocks, Gale
et al., 2022).
"""

import jax
from jax import lax

from pallas_kernels.dims import bind_dims, check_floating, check_int32
from pallas_kernels.grouped_product import reference, tiles
from pallas_kernels.implementations import Operation, tell_of_reference

PLATFORMS = {"reference": ("cpu", "gpu", "tpu"), "tiles": ("cpu", "gpu", "tpu")}
"""Platforms where each implementation runs."""

IMPLEMENTATIONS = tuple(PLATFORMS)

_FEW, _FEW_ON_GPUS = 1 << 13, 1 << 28
"""Numbers of x, once for each group, up to which the product of all rows with all groups costs as
little as a loop. Measured on two CPU cores. Of GPUs it is counted: 128 experts of 2,048 x 1,536
take 512 rows in half a millisecond at 800 TFLOP/s, and a loop that the host sees turn is slower."""

_OPERATION = Operation("grouped_product", "pallas_kernels.grouped_product", IMPLEMENTATIONS, {})


def grouped_product(
    x: jax.Array, w: jax.Array, sizes: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """Return the product of each row of x with the matrix of its group: the first `sizes[0]` rows
    are those of group 0, the next `sizes[1]` those of group 1, and so on.

    Sums are in float32, and float32 operands are never rounded. A row's result depends on no other
    row.

    Args:
      x: [M, A], rows sorted by group.
      w: [E, A, B], a matrix a group, of the type of x.
      sizes: i32[E], rows of each group; together at most M.
      implementation: one of IMPLEMENTATIONS, or None for the tiles; but for the reference on TPUs,
        where it is an instruction, and where there are few numbers.

    Returns:
      [M, B] in the type of x. It is unspecified what is in the rows behind all groups.

    Raises:
      ValueError: shapes or types differ from the above, or no such implementation.
    """
    bind_dims(x=(x, "MA"), w=(w, "EAB"), sizes=(sizes, "E"))
    check_floating(x=x)
    check_int32(sizes=sizes)
    if w.dtype != x.dtype:
        raise ValueError(f"w is {w.dtype}, but x is {x.dtype}")
    operands = x, w, sizes
    numbers = len(w) * x.size
    if implementation is None and numbers <= _FEW:
        implementation = "reference"
    if implementation is None:
        tell_of_reference("grouped_product", "there is none for it")
        whole, loop = reference.grouped_product, tiles.grouped_product
        on_gpus = whole if numbers <= _FEW_ON_GPUS else loop
        return lax.platform_dependent(*operands, tpu=whole, cuda=on_gpus, default=loop)
    return _OPERATION.choose(
        implementation,
        operands,
        bound=lambda name: _OPERATION.module(name).grouped_product,
        refusal=lambda name: None,
    )
