"""The longest token of a vocabulary that ends at each byte of a text: what a model of bytes may add to its input
(ALM's byte students, arXiv 2503.20083)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

WINDOW = 16
NONE = -1
"""In place of an id where no token ends."""


class SuffixLookup:
    """Finds, for rows of byte ids, the longest token that ends at each position.

    ids: of ordinary tokens by their bytes (`tokenizers.vocabulary.ordinary_ids`); longer ones than `WINDOW` bytes are
    left out. special: the token of this vocabulary that stands for a special one of the rows, by its id there (256 and
    more).

    Tokens are read backwards into a trie whose levels are numbered one after the other, each in order of (parent,
    byte): so the sorted keys `parent * 256 + byte` tell a child by their place.
    """

    def __init__(self, ids: Mapping[bytes, int], special: Mapping[int, int]):
        tokens = [token for token in ids if len(token) <= WINDOW]
        lengths = np.array([len(token) for token in tokens])
        reversed_bytes = np.array([list(token[::-1].ljust(WINDOW, b"\0")) for token in tokens], np.int64)
        of_token = np.array([ids[token] for token in tokens], np.int32)
        node, keys, found = np.zeros(len(tokens), np.int64), [], [np.array([NONE], np.int32)]
        first = 1  # node 0 is the root
        for depth in range(WINDOW):
            alive = lengths > depth
            level, place = np.unique(node[alive] * 256 + reversed_bytes[alive, depth], return_inverse=True)
            node[alive] = first + place
            ends, here = lengths == depth + 1, np.full(len(level), NONE, np.int32)
            here[node[ends] - first] = of_token[ends]
            keys.append(level)
            found.append(here)
            first += len(level)
        self._keys, self._ids = np.concatenate(keys), np.concatenate(found)
        # The first two levels are read from a table.
        self._two_levels = self._search(np.arange((1 + len(keys[0])) * 256))
        # Its last entry stands for all special tokens that nothing stands for.
        self._special = np.full(max(special, default=255) + 2, NONE, np.int32)
        self._special[list(special)] = list(special.values())

    def __call__(self, tokens: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
        """For rows [..., length] of byte ids, int32 [..., length]: the longest token whose bytes end at each position
        and lie in its segment, `NONE` where there is none. Special tokens give theirs, and no token reaches over them.
        """
        flat, special = tokens.reshape(-1), tokens >= 256
        begins = np.ones(tokens.shape, bool)
        begins[..., 1:] = (segment_ids[..., 1:] != segment_ids[..., :-1]) | special[..., 1:] | special[..., :-1]
        place = np.arange(flat.size)
        reach = place - np.maximum.accumulate(np.where(begins.reshape(-1), place, 0))
        found = np.full(flat.size, NONE, np.int32)
        at = np.flatnonzero(~special)
        node = np.zeros(len(at), np.int64)
        for depth in range(WINDOW):
            key = node * 256 + flat[at - depth]
            node = self._two_levels[key] if depth < 2 else self._search(key)
            ids, goes_on = self._ids[node], (node > 0) & (reach[at] > depth)
            found[at[ids != NONE]] = ids[ids != NONE]
            at, node = at[goes_on], node[goes_on]
        others = flat[special.reshape(-1)]
        found[special.reshape(-1)] = self._special[np.minimum(others, len(self._special) - 1)]
        return found.reshape(tokens.shape)

    def _search(self, key: np.ndarray) -> np.ndarray:
        """The child by a key, 0 where there is none; node 0, of which nobody is a child, has no token."""
        place = np.minimum(np.searchsorted(self._keys, key), len(self._keys) - 1)
        return np.where(self._keys[place] == key, place + 1, 0)
