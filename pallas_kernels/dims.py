"""Static checks of arguments; shapes are given in the letters of the dimension key."""

import math

import jax
import jax.numpy as jnp


def bind_dims(**arrays: tuple[jax.Array, str]) -> dict[str, int]:
    """Match every array's shape with the key's letters; return the size of each letter.

    Args:
      **arrays: argument name -> (array, one letter a dimension), e.g. `q=(q, "BNH")`.

    Raises:
      ValueError: an array has another number of dimensions, an empty dimension, or one that differs
        from an earlier array's dimension of the same letter.
    """
    sizes: dict[str, int] = {}
    said_by: dict[str, str] = {}
    for name, (array, letters) in arrays.items():
        key = f"[{', '.join(letters)}]"
        if array.ndim != len(letters):
            raise ValueError(f"{name} must be {key}, but its shape is {array.shape}")
        for letter, size in zip(letters, array.shape, strict=True):
            if size == 0:
                raise ValueError(f"{name} {key} must not be empty, but its shape is {array.shape}")
            if sizes.setdefault(letter, size) != size:
                raise ValueError(
                    f"{name} {key} has {letter} = {size}, "
                    f"but {said_by[letter]} has {letter} = {sizes[letter]}"
                )
            said_by.setdefault(letter, name)
    return sizes


def check_int32(**arrays: jax.Array) -> None:
    """Raise ValueError unless every array is int32."""
    for name, array in arrays.items():
        if array.dtype != jnp.int32:
            raise ValueError(f"{name} must be int32, but it is {array.dtype}")


def check_float32(**arrays: jax.Array) -> None:
    """Raise ValueError unless every array is float32."""
    for name, array in arrays.items():
        if array.dtype != jnp.float32:
            raise ValueError(f"{name} must be float32, but it is {array.dtype}")


def check_floating(**arrays: jax.Array) -> None:
    """Raise ValueError unless every array is of a floating type."""
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be of a floating type, but it is {array.dtype}")


def check_attention(
    sizes: dict[str, int],
    q: jax.Array,
    scale: float,
    logit_soft_cap: float | None,
    sliding_window: int | None,
) -> None:
    """Raise ValueError for arguments that no attention over pages allows, whatever its metadata.

    Args:
      sizes: the result of `bind_dims`.
      q: the queries.
      scale, logit_soft_cap, sliding_window: the options.
    """
    if sizes["N"] % sizes["K"]:
        raise ValueError(
            f"q has N = {sizes['N']} query heads, "
            f"which must be a multiple of the K = {sizes['K']} KV heads of k_pages"
        )
    check_floating(q=q)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a finite number > 0, but it is {scale}")
    if logit_soft_cap is not None and not (math.isfinite(logit_soft_cap) and logit_soft_cap > 0):
        raise ValueError(f"logit_soft_cap must be None or a finite number > 0: {logit_soft_cap}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be None or at least 1 token: {sliding_window}")


def check_eps(eps: float) -> None:
    """Raise ValueError unless RMSNorm may add eps to a mean of squares."""
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be a finite number >= 0, but it is {eps}")
