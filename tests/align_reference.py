"""Alignment one token at a time, by its definition: what the package's own is compared with."""

from __future__ import annotations

import numpy as np

from jaxdistill.align import Alignment, Placed
from jaxdistill.tokenizers import Tokenizer

WHITE_SPACE = (b" ", b"\t", b"\n")


def placed(tokenizer: Tokenizer, text: str) -> Placed:
    """A text's tokens, all inside; a word may begin with the first and with those that begin with white space."""
    ids, offsets = tokenizer.encode(text)
    vocabulary = tokenizer.token_bytes()
    opens = [index == 0 or vocabulary[token].startswith(WHITE_SPACE) for index, token in enumerate(ids)]
    return Placed(offsets[:, 1], np.ones(len(ids), bool), np.array(opens, bool))


def walked(student: Placed, teacher: Placed, *, words: bool = False) -> Alignment:
    """Goes on with the side that is behind; a chunk ends where both are at the same byte."""
    sides = [
        list(zip(side.ends.tolist(), side.inside.tolist(), side.opens.tolist(), strict=True))
        for side in (student, teacher)
    ]
    taken, at, runs, closed = [0, 0], [0, 0], [([], [])], [0]
    while taken != [len(sides[0]), len(sides[1])]:
        side = 1 if taken[0] == len(sides[0]) or (taken[1] < len(sides[1]) and at[1] < at[0]) else 0
        end, inside, _ = sides[side][taken[side]]
        if inside:
            runs[-1][side].append(taken[side])
        at[side], taken[side] = end, taken[side] + 1
        if at[0] == at[1] > closed[-1]:
            closed.append(end)
            runs.append(([], []))
    rest = runs.pop()
    if runs:
        for own, left in zip(runs[-1], rest, strict=True):
            own.extend(left)
    if words:
        runs = _words(sides, runs, closed[1:])
    ids = [np.zeros(len(side), np.int32) for side in sides]
    for chunk, run in enumerate(runs, start=1):
        for found, tokens in zip(ids, run, strict=True):
            found[tokens] = chunk
    return Alignment(*ids)


def _words(sides, runs, closed):
    """Runs joined until, on both sides, a token with which a word may begin starts where the run ends."""
    words = runs[:1]
    for run, start in zip(runs[1:], closed, strict=False):
        begins = []
        for side, tokens in zip(sides, run, strict=True):
            here = [token for token in tokens if (side[token - 1][0] if token else 0) == start]
            begins.append(any(side[token][2] for token in here))
        if all(begins):
            words.append(run)
        else:
            words[-1] = tuple(own + more for own, more in zip(words[-1], run, strict=True))
    return words
