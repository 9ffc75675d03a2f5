"""Documents to fixed-length rows: cut what is long, put what is short side by side, lose no target.

A document of n tokens is n - 1 predictions: position t holds token t and its target is token t + 1. Rows hold
predictions, so the last token of a document is only ever a target, and a document cut in two loses nothing: the last
position of one piece predicts the first token of the next, whose own positions start there. Every target of a document
is in exactly one piece. A piece is a segment of a row, with its own positions from 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar

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

    FATES: ClassVar = {name: name for name in ("split", "truncated", "dropped", "unsupervised")}
    """What is told of documents, and in which words."""

    def __add__(self, other: Self) -> Self:
        # Not `dataclasses.asdict`: this runs once for every document.
        return type(self)(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __str__(self) -> str:
        fates = {told: getattr(self, name) for name, told in self.FATES.items()}
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
    def sizes(self) -> tuple[int, ...]:
        """Its positions in every row that it takes part in: one."""
        return (len(self),)

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


class Sized(Protocol):
    """A piece of a document, for whoever packs: its positions in a row, or in each of two rows that go together."""

    @property
    def sizes(self) -> tuple[int, ...]: ...


P = TypeVar("P", bound=Sized)


class FirstFit(Generic[P]):
    """Puts pieces into rows: the first open row with room; a full row, or the fullest of too many, is finished.

    `rows` are the open ones in order of opening. `open_rows` of 1 fills one row after the other. length: positions of a
    row, or of each of the two rows of a pair. A pair has room where both rows have, and is as full as the fuller one.
    """

    def __init__(self, *, length: int | tuple[int, ...], open_rows: int, rows: Iterable[list[P]] = ()):
        self._lengths = (length,) if isinstance(length, int) else length
        self.open_rows = open_rows
        self.rows: list[list[P]] = [list(row) for row in rows]
        self._rooms = [self._room(row) for row in self.rows]

    def add(self, piece: P) -> list[list[P]]:
        """Places a piece; returns the rows that this finished, which are no longer open."""
        finished, sizes = [], piece.sizes
        first, last = sizes[0], sizes[-1]
        # One or two sizes: this runs for every open row.
        at = next((at for at, room in enumerate(self._rooms) if room[0] >= first and room[-1] >= last), None)
        if at is None:
            if len(self.rows) == self.open_rows:
                finished.append(self._finish(min(range(len(self.rows)), key=self._emptiness)))
            at = len(self.rows)
            self.rows.append([])
            self._rooms.append(self._lengths)
        self.rows[at].append(piece)
        self._rooms[at] = tuple(room - size for room, size in zip(self._rooms[at], sizes, strict=True))
        if min(self._rooms[at]) == 0:
            finished.append(self._finish(at))
        return finished

    def _room(self, row: list[P]) -> tuple[int, ...]:
        taken = [piece.sizes for piece in row]
        return tuple(length - sum(sizes[side] for sizes in taken) for side, length in enumerate(self._lengths))

    def _emptiness(self, at: int) -> float:
        return min(room / length for room, length in zip(self._rooms[at], self._lengths, strict=True))

    def _finish(self, at: int) -> list[P]:
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


class RowKind(Protocol):
    """How documents of one kind become rows: what differs between one tokenizer and two."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions of a row, or of each of the two rows of a pair."""
        ...

    @property
    def nothing(self) -> Any:
        """The statistics before the first document."""
        ...

    def cut(self, document: Any, *, long_documents: LongDocuments, origin: tuple[int, ...] = ()) -> tuple[list, Any]:
        """The pieces of a document, and what was done to it."""
        ...

    def piece(self, document: Any, start: int, stop: int, origin: tuple[int, ...]) -> Any:
        """The piece that was cut with this `start` and `stop`."""
        ...

    def count(self, row: list) -> Any:
        """The part of the statistics that an emitted row adds."""
        ...

    def arrays(self, rows: Sequence[list]) -> dict[str, Any]:
        """Rows as the fields of a batch."""
        ...

    def shortened(self, divisor: int) -> RowKind:
        """The same with rows whose lengths are divided, rounded up."""
        ...


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of `length` positions, of one tokenizer's documents."""

    length: int
    nothing = Statistics()

    @property
    def lengths(self) -> tuple[int, ...]:
        return (self.length,)

    def cut(
        self, document: Tokenized, *, long_documents: LongDocuments, origin: tuple[int, ...] = ()
    ) -> tuple[list[Piece], Statistics]:
        return cut(document, length=self.length, long_documents=long_documents, origin=origin)

    def piece(self, document: Tokenized, start: int, stop: int, origin: tuple[int, ...]) -> Piece:
        return Piece(document, start, stop, origin)

    def count(self, row: Row) -> Statistics:
        return count_row(row, self.length)

    def arrays(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        return to_arrays(rows, self.length)

    def shortened(self, divisor: int) -> Rows:
        return Rows(-(-self.length // divisor))
