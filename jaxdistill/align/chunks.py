"""Chunks: runs of tokens of two tokenizers that end at the same byte.

Nothing but offsets is looked at. Both tokenizations are placed in one coordinate, the bytes of the original text; a
special token that both sides have is an event one wide at its place, what only one side has is zero wide. So special
tokens of one side, text that a tokenizer changed or dropped, and tokens that end inside a UTF-8 character need no rule
of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

Chunks = Literal["minimal", "words"]
"""minimal: a chunk ends wherever a token ends on both sides. words: only where, next, a word may begin on both."""


class Placed(NamedTuple):
    """Tokens in the common coordinate: those of one text, or of several one after the other.

    ends: int64 [tokens], where each token ends in its text; it starts where the one before ends, the first at 0.
    inside: bool [tokens], False for a token that the other side does not have, which is zero wide and in no chunk; None
    if there is none. opens: bool [tokens], whether a word may begin with a token: it begins with white space, or a text
    or an event ended before it; for chunks of words alone. counts: int64 [texts], tokens of each text; None for one.
    """

    ends: np.ndarray
    inside: np.ndarray | None = None
    opens: np.ndarray | None = None
    counts: np.ndarray | None = None


class Alignment(NamedTuple):
    """The chunk of every token, int32 [tokens] on each side: 0 is none, a text's chunks count from 1."""

    student: np.ndarray
    teacher: np.ndarray


def align(student: Placed, teacher: Placed, *, chunks: Chunks = "minimal") -> Alignment:
    """The chunks of texts that were tokenized twice. Several texts at once are faster than one after the other.

    Within a text every chunk holds tokens of both sides, the widths of its tokens add up to the same on both, and
    together chunks hold every token that is `inside`. A token of width zero belongs to the chunk that follows, or to
    the last one at the end of the text. Where one side has nothing of a text, no token of it is in a chunk.

    Raises ValueError for two sides that end at different places: they are not of the same text. The minimal chunks are
    those of approximate likelihood matching (Minixhofer et al., 2025, arXiv 2503.20083), found there by comparing
    lengths of strings.
    """
    sides = (student, teacher)
    counts = [_counts(side) for side in sides]
    sizes, common = _sizes(sides, counts)
    texts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    ends = [side.ends + np.repeat(texts[:-1], count) for side, count in zip(sides, counts, strict=True)]
    borders = [_marks(places, texts) for places in ends]
    if chunks == "words":
        begun = np.logical_and(*(_marks(_opening(*each), texts) for each in zip(sides, ends, strict=True)))
        borders = [own & begun for own in borders]
    ids = []
    for side, places, count, other in zip(sides, ends, counts, reversed(borders), strict=True):
        closing = other[places]
        # Of tokens that end at one place, all but the first are zero wide and close nothing.
        closing[1:] &= places[1:] > places[:-1]
        ids.append(_numbered(side, closing, count, common))
    return Alignment(*ids)


def boundary_mask(
    token_bytes: Sequence[bytes], special_ids: Iterable[int], *, white_space: Iterable[bytes] = (b" ", b"\t", b"\n")
) -> np.ndarray:
    """Ids with which something new begins, bool [vocab]: those that begin with white space, and special tokens.

    The probability of these ids after a chunk is the probability that its last word ends there. token_bytes: what each
    id contributes to text (`Tokenizer.token_bytes`); a dummy prefix counts as the space that it looks like.
    """
    begins = tuple(white_space)
    mask = np.fromiter((piece.startswith(begins) for piece in token_bytes), bool, len(token_bytes))
    mask[list(special_ids)] = True
    return mask


def _counts(side: Placed) -> np.ndarray:
    return np.asarray([len(side.ends)] if side.counts is None else side.counts, np.int64)


def _sizes(sides: Sequence[Placed], counts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The length of every text, int64 [texts], and whether both sides have something of it, bool [texts]."""
    student, teacher = (
        np.where(count > 0, np.append(side.ends, 0)[np.cumsum(count) - 1], 0)
        for side, count in zip(sides, counts, strict=True)
    )
    common = (student > 0) & (teacher > 0)
    for text in np.flatnonzero((student != teacher) & common):
        raise ValueError(
            f"text {text} ends at {student[text]} for the student and at {teacher[text]} for the teacher; give two "
            "tokenizations of the same text, with what only one of them has as zero wide."
        )
    return np.maximum(student, teacher), common


def _marks(places: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Which places of the coordinate through all texts are given, bool [places]; none where a text begins or ends."""
    marks = np.zeros(texts[-1] + 1, bool)
    marks[places] = True
    marks[texts] = False
    return marks


def _opening(side: Placed, ends: np.ndarray) -> np.ndarray:
    """Where a word may begin on one side, in the coordinate through all texts."""
    if side.opens is None:
        raise ValueError("chunks of words need `opens`, for both sides: whether a word may begin with a token.")
    # A text's first token gets the end of a text before, whose place is not looked at either.
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(ends)]
    return starts[side.opens if side.inside is None else side.opens & side.inside]


def _numbered(side: Placed, closing: np.ndarray, counts: np.ndarray, common: np.ndarray) -> np.ndarray:
    """Chunk ids, from the tokens after which another chunk begins, bool [tokens]."""
    passed = np.zeros(len(closing) + 1, np.int32)
    np.cumsum(closing, out=passed[1:])
    before = passed[np.cumsum(counts) - counts]
    ids = passed[:-1] + np.repeat(common.astype(np.int32) - before, counts)
    return ids if side.inside is None else ids * side.inside
