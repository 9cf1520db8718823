"""Arrays that travel as one come out as they went in."""

import jax
import numpy as np
import pytest

from pdjax.device.packing import Packed

ARRAYS: dict[str, np.ndarray] = {
    "ids": np.arange(-3, 9, dtype=np.int32).reshape(3, 2, 2),
    "row": np.array(7, np.int32),
    "share": np.array([0.1, -0.0, np.inf, np.nan], np.float32),
    "seed": np.array([[0], [2**32 - 1]], np.uint32),
}


def test_bits_types_and_shapes_survive():
    packed = Packed.of(ARRAYS)
    assert packed.words.dtype == np.int32
    out = jax.jit(Packed.unpack)(packed)
    assert out.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert (out[name].dtype, out[name].shape) == (array.dtype, array.shape)
        assert np.asarray(out[name]).tobytes() == array.tobytes()


def test_every_array_begins_where_a_kernel_may_read_it():
    packed = Packed.of({"one": np.ones(1, np.int32), "many": np.full(65, 2, np.int32)})
    assert packed.words.tolist() == [1] + 63 * [0] + 65 * [2] + 63 * [0]


def test_it_is_a_copy():
    ids = np.zeros(4, np.int32)
    packed = Packed.of({"ids": ids})
    ids[:] = 1
    assert not packed.words.any()


def test_other_contents_are_the_same_program():
    traces: list[Packed] = []

    @jax.jit
    def step(packed: Packed) -> dict[str, jax.Array]:
        traces.append(packed)
        return packed.unpack()

    for value in (1, 2):
        step(Packed.of({"ids": np.full(3, value, np.int32)}))
    assert len(traces) == 1
    step(Packed.of({"ids": np.zeros((3, 1), np.int32)}))
    assert len(traces) == 2


def test_other_widths_are_refused():
    with pytest.raises(AssertionError, match="mask: bool"):
        Packed.of({"mask": np.zeros(4, np.bool_)})
