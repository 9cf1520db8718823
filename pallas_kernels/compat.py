"""Where the JAX versions that this package runs on differ."""

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

CAN_INTERPRET_MOSAIC_GPU = hasattr(plgpu, "InterpretGPUParams")
"""From JAX 0.11; the interpreter of 0.10 is private and knows no transposed references."""


def transpose_ref(ref: Any) -> Any:
    """A view of a two-dimensional reference with its axes swapped."""
    if hasattr(plgpu, "transpose_ref"):  # JAX 0.10
        return plgpu.transpose_ref(ref, (1, 0))
    return ref.transpose((1, 0))
