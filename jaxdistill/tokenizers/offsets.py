"""Byte offsets of tokens: exact where the tokens spell the text, filled and refined where a normaliser changed it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def exact_offsets(text: bytes, pieces: Sequence[bytes], lengths: np.ndarray) -> np.ndarray | None:
    """Offsets [tokens, 2] if the tokens spell the text, alone or behind one dummy space; None otherwise.

    pieces: the bytes of each token. lengths: their byte lengths. Because the concatenation is compared with the text,
    `text[start:end]` is the token's bytes by construction, inside UTF-8 characters as well. The dummy space takes no
    bytes, so a token that is only the prefix has width zero.
    """
    spelled = b"".join(pieces)
    if spelled == text:
        return _from_ends(np.cumsum(lengths))
    if len(spelled) == len(text) + 1 and spelled[:1] == b" " and spelled[1:] == text:
        return _from_ends(np.cumsum(lengths) - 1)
    return None


def matched_offsets(text: bytes, pieces: Sequence[bytes]) -> np.ndarray | None:
    """Offsets if the tokens spell the text with dummy spaces anywhere (after special tokens); None otherwise."""
    ends, position = [], 0
    for piece in pieces:
        if text.startswith(piece, position):
            position += len(piece)
        elif piece[:1] == b" " and text.startswith(piece[1:], position):
            position += len(piece) - 1
        else:
            return None
        ends.append(position)
    return _from_ends(np.asarray(ends, np.int64)) if position == len(text) else None


def refined_offsets(starts: np.ndarray, ends: np.ndarray, lengths: np.ndarray, text_bytes: int) -> np.ndarray:
    """Contiguous offsets from a library's approximate byte spans, for a text that a normaliser changed.

    starts, ends: the library's spans [tokens] in bytes of the original text; tokens that end inside a character
    overlap there. Each run of overlapping tokens shares out the bytes it covers: by the tokens' own byte lengths where
    those add up, otherwise in proportion to them (the normaliser changed these characters). Uncovered bytes before a
    token belong to it, those after the last token to the last.
    """
    tokens = len(starts)
    if tokens == 0:
        return np.zeros((0, 2), np.int64)
    ends = np.clip(np.maximum(ends, starts), 0, text_bytes)
    reached = np.maximum.accumulate(ends)
    opens = np.r_[True, starts[1:] >= reached[:-1]]
    first = np.flatnonzero(opens)
    run = np.cumsum(opens) - 1
    run_start, run_end = starts[first], reached[np.r_[first[1:] - 1, tokens - 1]]
    run_bytes, run_lengths = run_end - run_start, np.add.reduceat(lengths, first)
    spelled = np.cumsum(lengths) - (np.cumsum(lengths)[first] - lengths[first])[run]
    shared = run_start[run] + run_bytes[run] * spelled // np.maximum(run_lengths, 1)[run]
    alone = np.bincount(run, minlength=len(first))[run] == 1
    refined = np.maximum.accumulate(np.where(alone, ends, shared))
    refined[-1] = text_bytes
    return _from_ends(refined)


def character_starts(text: str) -> np.ndarray:
    """Byte position of every character of a text, its byte length last: int64 [characters + 1]."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(widths)])


def _from_ends(ends: np.ndarray) -> np.ndarray:
    ends = ends.astype(np.int64)
    return np.stack([np.concatenate([ends[:1] * 0, ends[:-1]]), ends], axis=1)
