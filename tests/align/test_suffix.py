"""The longest token that ends at each byte, against a search of every suffix."""

from __future__ import annotations

import numpy as np
import pytest

from jaxdistill.align.suffix import NONE, WINDOW, SuffixLookup

SPECIAL = {256: 700, 259: 3}


def random_vocabulary(rng: np.random.Generator) -> dict[bytes, int]:
    """Tokens of few different bytes, some longer than the window, and two of the bytes in no token at all."""
    tokens = {bytes(rng.integers(97, 100, rng.integers(1, WINDOW + 4)).tolist()) for _ in range(400)} - {b"b"}
    return {token: 10 + number for number, token in enumerate(sorted(tokens, key=lambda _: rng.random()))}


def definition(ids, row, segments) -> list[int]:
    found = []
    for at, token in enumerate(row):
        if token >= 256:
            found.append(SPECIAL.get(token, NONE))
            continue
        start = at
        while start > 0 and row[start - 1] < 256 and segments[start - 1] == segments[at]:
            start -= 1
        suffixes = (bytes(row[begin : at + 1]) for begin in range(max(start, at + 1 - WINDOW), at + 1))
        found.append(next((ids[suffix] for suffix in suffixes if suffix in ids), NONE))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_ids_are_those_of_a_search_of_every_suffix(seed):
    rng = np.random.default_rng(seed)
    ids = random_vocabulary(rng)
    rows = rng.integers(97, 102, (6, 200)).astype(np.int32)
    rows[rng.random(rows.shape) < 0.05] = 256
    rows[rng.random(rows.shape) < 0.02] = 300  # nothing stands for it
    rows[0, :40] = [97, 98] * 20  # longer than every window
    segments = np.cumsum(rng.random(rows.shape) < 0.05, axis=1).astype(np.int32)
    found = SuffixLookup(ids, SPECIAL)(rows, segments)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, [definition(ids, *each) for each in zip(rows.tolist(), segments, strict=True)])
    lengths = [len(token) for token, id in ids.items() if id in set(found.ravel().tolist())]
    assert max(lengths) > 4
    assert (found == NONE).any()


def test_no_token_reaches_over_the_beginning_of_a_document():
    """Packed rows: what a document's first byte is given depends on no other document."""
    ids = {b"a": 1, b"b": 2, b"ab": 3, b"bab": 4}
    row, segments = np.frombuffer(b"abab", np.uint8).astype(np.int32), np.array([1, 1, 2, 2])
    lookup = SuffixLookup(ids, {})
    assert lookup(row, np.ones(4, int)).tolist() == [1, 3, 1, 4]
    assert lookup(row, segments).tolist() == [1, 3, 1, 3]
    assert lookup(row.reshape(2, 2), np.ones((2, 2), int)).tolist() == [[1, 3], [1, 3]]


def test_a_special_token_is_itself_and_ends_what_was_before():
    lookup = SuffixLookup({b"a": 1, b"aa": 2}, SPECIAL)
    row = np.array([97, 97, 256, 97, 259, 258, 97])
    assert lookup(row, np.ones(7, int)).tolist() == [1, 2, 700, 1, 3, NONE, 1]


def test_the_longest_within_the_window():
    ids = {b"a" * length: length for length in (1, 15, 16, 17)}
    assert SuffixLookup(ids, {})(np.full(20, 97), np.ones(20, int)).tolist() == [1] * 14 + [15] + [16] * 5
