"""A shuffled order of any number of documents, computed index by index: no list of them is ever held."""

from __future__ import annotations

import functools

import numpy as np

_ROUNDS = 6
_MASK = (1 << 64) - 1


def permuted(index: int, size: int, key: tuple[int, ...]) -> int:
    """Where `index` goes in the permutation of range(size) that `key` names. Stable across versions and machines.

    A Feistel network permutes the next power of four; what falls outside the range is permuted again until it is
    inside, which keeps it a permutation (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    # At least 64 values: on fewer, a network of halves reaches few of the permutations.
    half_bits = max(3, (max(1, size - 1).bit_length() + 1) // 2)
    mask, round_keys = (1 << half_bits) - 1, _round_keys(key)
    while True:
        left, right = index >> half_bits, index & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        index = left << half_bits | right
        if index < size:
            return index


@functools.lru_cache(maxsize=4096)
def _round_keys(key: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64).tolist())


def _mix(value: int) -> int:
    """The finalizer of SplitMix64: every input bit changes every output bit about half of the time."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
