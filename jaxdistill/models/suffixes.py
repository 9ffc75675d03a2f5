"""The longest token of another vocabulary that ends at each byte of a row: what a model of bytes adds to its input, so
that words it knew as tokens are still told apart at once (the byte students of ALM, arXiv 2503.20083).

Tokens are read backwards into a trie, which is an array among the model's parameters: what a row's bytes mean to a
model is then a function of the row alone, in training and in generation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt

WINDOW = 16
"""Longer tokens are left out (the authors' code looks no further either)."""
NONE = -1
"""In place of an id where no token ends."""
BYTES = 256
"""Ids below are bytes; those from here on are special tokens."""
COLUMNS = 10
"""Of a node: 8 words, a bit for each byte by which the node has a child; the first child's number; its token or `NONE`.
Children have consecutive numbers, so the others are found by counting bits."""
_FIRST, _TOKEN = 8, 9


def build_trie(ids: Mapping[bytes, int], special: Mapping[int, int], *, vocab: int) -> Int[np.ndarray, "node 10"]:
    """The trie, int32. Node 0 is the root; the last `vocab` - 256 nodes are what special tokens of the rows stand for.

    ids: of ordinary tokens by their bytes (`tokenizers.vocabulary.ordinary_ids`). special: the token of this vocabulary
    that stands for a special one of the rows, by its id there. vocab: how many ids the rows may have.
    """
    tokens = [token for token in ids if 0 < len(token) <= WINDOW]
    lengths = np.array([len(token) for token in tokens])
    backwards = np.array([list(token[::-1].ljust(WINDOW, b"\0")) for token in tokens], np.int64)
    of_token = np.array([ids[token] for token in tokens], np.int64)
    node, levels, first = np.zeros(len(tokens), np.int64), [_childless(1)], 1
    for depth in range(WINDOW):
        alive = lengths > depth
        # Sorted by parent, then by byte: so the children of a node follow one another.
        edges, place = np.unique(node[alive] * BYTES + backwards[alive, depth], return_inverse=True)
        parents, bytes_, above = edges // BYTES, edges % BYTES, first - len(levels[-1])
        np.bitwise_or.at(levels[-1], (parents - above, bytes_ // 32), np.uint32(1) << (bytes_ % 32).astype(np.uint32))
        having, oldest = np.unique(parents, return_index=True)
        levels[-1][having - above, _FIRST] = first + oldest
        node[alive] = first + place
        ends, level = lengths == depth + 1, _childless(len(edges))
        level[node[ends] - first, _TOKEN] = of_token[ends]
        levels.append(level)
        first += len(edges)
    alone = _childless(vocab - BYTES)
    for token, source in special.items():
        alone[token - BYTES, _TOKEN] = source
    return np.concatenate([*levels, alone]).view(np.int32)


def _childless(nodes: int) -> UInt[np.ndarray, "node 10"]:
    found = np.zeros((nodes, COLUMNS), np.uint32)
    found[:, _TOKEN] = np.uint32(NONE % 2**32)
    return found


def empty_trie(key: Array, shape: Sequence[Any], dtype: Any = jnp.int32, out_sharding: Any = None) -> Array:
    """A trie that finds nothing, as an initialiser."""
    return jnp.zeros(shape, dtype).at[:, _TOKEN].set(NONE)


def longest_suffixes(
    trie: Int[Array, "node 10"],
    tokens: Int[Array, "batch length"],
    segment_ids: Int[Array, "batch length"],
    *,
    vocab: int,
) -> Int[Array, "batch length"]:
    """The longest token whose bytes end at each position and lie in its segment, `NONE` where there is none.

    Special tokens give theirs, and no token reaches over them. vocab: as the trie was built for.
    """
    special = tokens >= BYTES
    alone = trie.shape[0] - vocab + tokens

    def longer(carry, _):
        node, alive, found, before, segments_before = carry
        row = trie[node]
        token = row[..., _TOKEN]
        found = jnp.where(alive & (token != NONE), token, found)
        child, exists = _child(row, before)
        alive &= exists & (segments_before == segment_ids)
        return (jnp.where(alive, child, 0), alive, found, _shifted(before, BYTES), _shifted(segments_before, 0)), None

    # A special token is a node without children, any other begins at the root.
    start = (jnp.where(special, alone, 0), jnp.full(tokens.shape, True), jnp.full(tokens.shape, NONE))
    carry, _ = jax.lax.scan(longer, (*start, tokens, segment_ids), length=WINDOW + 1)
    return carry[2]


def _child(row: Array, byte: Array) -> tuple[Array, Array]:
    """The child's number by a byte, and whether there is one; by what is no byte there is none."""
    word, bit = (byte // 32)[..., None], jnp.left_shift(1, byte % 32)
    words, places = row[..., :_FIRST], jnp.arange(_FIRST)
    own = jnp.where(places == word, words, 0).sum(-1)
    counted = jnp.where(places < word, words, jnp.where(places == word, words & (bit - 1)[..., None], 0))
    return row[..., _FIRST] + jax.lax.population_count(counted).sum(-1), (own & bit) != 0


def _shifted(x: Array, fill: int) -> Array:
    """What stands one position before each."""
    return jnp.pad(x, ((0, 0), (1, 0)), constant_values=fill)[:, :-1]
