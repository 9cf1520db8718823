"""Choice among the cases of a kernel's folder.

The reference runs at all of them, and so does every implementation in `pallas_kernels.check`, on
hardware. An interpreter takes a second a case, and a lowering another: tests leave out cases whose
edges another one has, too.
"""

from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh


def without(cases: Iterable[Any], *names: str) -> list[Any]:
    """List the cases but those of these names.

    Raises:
      ValueError: a name is none of the cases', or several have it.
    """
    left = list(cases)
    for name in names:
        named = [case for case in left if case.name == name]
        if len(named) != 1:
            raise ValueError(f"names: {name!r} must be the name of one case, not {len(named)}")
        left.remove(named[0])
    return left


class Launched(Exception):
    """A kernel of Mosaic has been launched: there is room for all that it wants to share."""


def check_room(run: Callable[..., Any], *operands: Any) -> None:
    """Lower one kernel for an H100, as far as its launch.

    What comes behind that, most of all which layout every array has, takes Mosaic most of the time,
    and does not depend on how full the memory is.

    Raises:
      ValueError: the kernel shares more memory than a processor has; or another fault that Mosaic
        finds before the launch.
    """
    device = AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    behind = "jax.experimental.mosaic.gpu.layout_inference.infer_layout"
    with use_abstract_mesh(mesh), mock.patch(behind, side_effect=Launched):
        traced = jax.jit(run).trace(*operands)
        with pytest.raises(Launched):
            traced.lower(lowering_platforms=("cuda",))
