"""Documents to fixed-length rows: cut what is long, put what is short side by side, lose no target.

A document of n tokens is n - 1 predictions: position t holds token t and its target is token t + 1. Rows hold
predictions, so the last token of a document is only ever a target, and a document cut in two loses nothing: the last
position of one piece predicts the first token of the next, whose own positions start there. Every target of a document
is in exactly one piece. A piece is a segment of a row, with its own positions from 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from jaxdistill.data.tokenize import Tokenized

LongDocuments = Literal["split", "truncate", "drop"]

BATCH_DTYPES = {
    "tokens": np.int32,
    "targets": np.int32,
    "loss_mask": np.float32,
    "positions": np.int32,
    "segment_ids": np.int32,
    "target_bytes": np.int32,
}
"""The fields of `types.Batch` and their types."""


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What became of the documents. Counts of documents, but for the last four.

    unsupervised: nothing to predict (empty, a single token, no assistant's turn). tokens: positions in use of emitted
    rows; supervised: those with a loss; positions: all of them, padding included.
    """

    documents: int = 0
    split: int = 0
    truncated: int = 0
    dropped: int = 0
    unsupervised: int = 0
    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    positions: int = 0

    def __add__(self, other: Statistics) -> Statistics:
        # Not `dataclasses.asdict`: this runs once for every document.
        return Statistics(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __str__(self) -> str:
        fates = {
            "split": self.split,
            "truncated": self.truncated,
            "dropped": self.dropped,
            "unsupervised": self.unsupervised,
        }
        told = "".join(f", {count:,} {fate}" for fate, count in fates.items() if count)
        return f"{self.documents:,} documents{told}: {self.rows:,} rows, {self.padding_fraction:.1%} padding"

    @property
    def padding_fraction(self) -> float:
        """The share of positions that hold nothing."""
        return 1 - self.tokens / self.positions if self.positions else 0.0


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive predictions of one document: those of positions `start` to `stop`, with their document at hand.

    origin: names the document for whoever packs (a source and a position in its stream); it is not looked at here.
    """

    document: Tokenized
    start: int
    stop: int
    origin: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def supervised(self) -> int:
        return int(np.count_nonzero(self.document.supervised[self.start + 1 : self.stop + 1]))


def cut(
    document: Tokenized, *, length: int, long_documents: LongDocuments, origin: tuple[int, ...] = ()
) -> tuple[list[Piece], Statistics]:
    """The pieces of one document, none longer than `length` positions, and what was done to it.

    "split" keeps every prediction, "truncate" the first `length`, "drop" none of a document that is too long. Pieces
    without a supervised target are left out: nothing can be learnt from them.
    """
    predictions = max(0, len(document) - 1)
    counted = {"documents": 1}
    if predictions > length:
        counted[{"split": "split", "truncate": "truncated", "drop": "dropped"}[long_documents]] = 1
        if long_documents == "drop":
            return [], Statistics(**counted)
        if long_documents == "truncate":
            predictions = length
    pieces = [
        Piece(document, start, min(start + length, predictions), origin) for start in range(0, predictions, length)
    ]
    pieces = [piece for piece in pieces if piece.supervised]
    return pieces, Statistics(**counted, unsupervised=int(not pieces))


Row = list[Piece]


class FirstFit:
    """Puts pieces into rows: the first open row with room; a full row, or the fullest of too many, is finished.

    `rows` are the open ones in order of opening. `open_rows` of 1 fills one row after the other.
    """

    def __init__(self, *, length: int, open_rows: int, rows: Iterable[Row] = ()):
        self.length, self.open_rows = length, open_rows
        self.rows: list[Row] = [list(row) for row in rows]
        self._rooms = [length - sum(map(len, row)) for row in self.rows]

    def add(self, piece: Piece) -> list[Row]:
        """Places a piece; returns the rows that this finished, which are no longer open."""
        finished = []
        at = next((at for at, room in enumerate(self._rooms) if room >= len(piece)), None)
        if at is None:
            if len(self.rows) == self.open_rows:
                finished.append(self._finish(self._rooms.index(min(self._rooms))))
            at = len(self.rows)
            self.rows.append([])
            self._rooms.append(self.length)
        self.rows[at].append(piece)
        self._rooms[at] -= len(piece)
        if self._rooms[at] == 0:
            finished.append(self._finish(at))
        return finished

    def _finish(self, at: int) -> Row:
        self._rooms.pop(at)
        return self.rows.pop(at)


def count_row(row: Row, length: int) -> Statistics:
    """The part of the statistics that an emitted row adds."""
    return Statistics(
        rows=1,
        tokens=sum(len(piece) for piece in row),
        supervised=sum(piece.supervised for piece in row),
        positions=length,
    )


def to_arrays(rows: Sequence[Row], length: int) -> dict[str, np.ndarray]:
    """Rows as the fields of a `Batch`, each [rows, length]; unused positions hold 0 in every field."""
    batch = {name: np.zeros((len(rows), length), dtype) for name, dtype in BATCH_DTYPES.items()}
    for index, row in enumerate(rows):
        at = 0
        for segment, piece in enumerate(row, start=1):
            span, document = slice(at, at + len(piece)), piece.document
            inputs, targets = slice(piece.start, piece.stop), slice(piece.start + 1, piece.stop + 1)
            batch["tokens"][index, span] = document.ids[inputs]
            batch["targets"][index, span] = document.ids[targets]
            batch["loss_mask"][index, span] = document.supervised[targets]
            batch["positions"][index, span] = np.arange(len(piece))
            batch["segment_ids"][index, span] = segment
            batch["target_bytes"][index, span] = document.text_bytes[targets]
            at = span.stop
    return batch
