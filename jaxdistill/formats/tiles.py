"""Copies between arrays whose axes lie in different orders, tile by tile.

NumPy copies a transposed matrix row by row, and so reads each cache line once for every number in it; tiles that fit
into the cache read it once. Measured on a matrix of 14336 x 4096 in bfloat16, other work running: 1.1 GB/s
against 0.2.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

TILE = 128
SMALLEST = 1024
"""Numbers in a tile below which the interpreter would take longer than the copy."""


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`, fast where the two have their axes in different orders. Casts as NumPy does."""
    own, other = _fastest(target), _fastest(source)
    if own == other or min(TILE, target.shape[own]) * min(TILE, target.shape[other]) < SMALLEST:
        target[...] = source
        return
    steps = [range(0, size, TILE if axis in (own, other) else 1) for axis, size in enumerate(target.shape)]
    lengths = [TILE if axis in (own, other) else 1 for axis in range(target.ndim)]
    for corner in itertools.product(*steps):
        tile = tuple(slice(start, start + length) for start, length in zip(corner, lengths, strict=True))
        target[tile] = source[tile]


def c_ordered(array: np.ndarray, dtype: Any = None) -> np.ndarray:
    """The array with its last axis fastest, as this dtype; itself, if that is what it is."""
    dtype = array.dtype if dtype is None else np.dtype(dtype)
    if array.flags.c_contiguous and array.dtype == dtype:
        return array
    made = np.empty(array.shape, dtype)
    copy_into(made, array)
    return made


def _fastest(array: np.ndarray) -> int:
    """The axis along which neighbours lie next to each other."""
    return min(range(array.ndim), key=lambda axis: (array.shape[axis] == 1, abs(array.strides[axis])), default=0)
