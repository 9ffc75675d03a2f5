import itertools

import ml_dtypes
import numpy as np
import pytest

from jaxdistill.formats.tiles import TILE, c_ordered, copy_into

SHAPES = [(), (5,), (0, 300), (TILE, TILE), (2 * TILE + 7, TILE + 1), (3, 300, 129), (2, 130, 3, 200)]


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.uint8, ml_dtypes.bfloat16, np.float64])
def test_every_order_of_axes(shape, dtype):
    array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    for order in itertools.permutations(range(array.ndim)):
        given = array.transpose(order)
        found = c_ordered(given)
        assert found.flags.c_contiguous
        assert (bits(found) == bits(given)).all()
        # Into an array whose own axes lie in another order.
        target = np.full(shape, 7, dtype).transpose(order)
        copy_into(target, np.asarray(given, order="C"))
        assert (bits(target) == bits(given)).all()


def test_values_are_cast_tile_by_tile():
    array = np.random.default_rng(0).standard_normal((300, 200)).astype(ml_dtypes.bfloat16)
    found = c_ordered(array.T, np.float32)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, array.T.astype(np.float32))


def test_what_is_in_order_is_not_copied():
    array = np.zeros((300, 200), np.float32)
    assert c_ordered(array) is array
    assert c_ordered(array, np.float64) is not array
