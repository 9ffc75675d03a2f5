"""Aligned documents to pairs of rows, one for the student and one for the teacher: cut at the ends of chunks.

A document's tokens are split on both sides into *units*: a chunk and what is in no chunk before it; what follows the
last chunk is a unit of its own. A piece holds consecutive units. Both models should predict them from the same bytes,
so a piece that does not begin a document begins with the whole chunk before, which is supervised in the piece before.
Where a document goes on, a piece also has the position after its last token, so that its input is the end of the last
chunk: what is predicted there says whether a word ends. That target is supervised in the next piece.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from jaxdistill.data.aligned import AlignedDocument, Units
from jaxdistill.data.packing import LongDocuments, Piece, Statistics, to_arrays
from jaxdistill.data.tokenize import Tokenized


@dataclasses.dataclass(frozen=True)
class AlignedStatistics(Statistics):
    """What became of documents in pairs of rows. Rows, tokens, supervised and positions are the student's.

    long_chunks: chunks left out, because they do not fit a row together with the chunk before. chunks: those with a
    loss in emitted rows. teacher_tokens, teacher_positions: as tokens and positions.
    """

    long_chunks: int = 0
    chunks: int = 0
    teacher_tokens: int = 0
    teacher_positions: int = 0

    FATES: ClassVar = Statistics.FATES | {"long_chunks": "chunks longer than a row"}


@dataclasses.dataclass(frozen=True)
class AlignedPiece:
    """Units `start` to `stop` of one document, after the chunk before them (none at the document's beginning)."""

    document: AlignedDocument
    start: int
    stop: int
    origin: tuple[int, ...] = ()

    @functools.cached_property
    def sides(self) -> tuple[Piece, ...]:
        """The predictions of the student and of the teacher; targets of other pieces are not supervised here."""
        return tuple(
            self._side(units, tokens)
            for units, (tokens, _) in zip(self.document.units, self.document.sides, strict=True)
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(map(len, self.sides))

    @property
    def supervised(self) -> int:
        """The student's supervised targets."""
        return self.sides[0].supervised

    @property
    def chunks(self) -> int:
        """The chunks that are supervised here."""
        return int(np.count_nonzero(self.document.supervised[self.start : self.stop]))

    def targets(self) -> list[np.ndarray]:
        """The chunk of the target at each position, int32, for both sides: those supervised here count from 1."""
        # Of this piece's chunks alone: a long document has many pieces.
        wanted = np.append(False, self.document.supervised[self.start : self.stop])
        numbers = np.cumsum(wanted, dtype=np.int32) * wanted
        found = []
        for units, size, (_, chunks) in zip(self.document.units, self.sizes, self.document.sides, strict=True):
            first = units.begin(self.start) + 1
            here = chunks[first : first + size] - self.start
            found.append(numbers[np.where((here > 0) & (here < len(numbers)), here, 0)])
        return found

    def _side(self, units: Units, tokens: Tokenized) -> Piece:
        begin, end = units.begin(self.start), int(units.reach[self.stop - 1])
        held, index = slice(begin, end + 1), np.arange(begin, end + 1)
        # Up to the end of the unit before, targets belong to the piece before.
        own = (index > (units.lasts[self.start - 1] if self.start else 0)) & (index <= units.lasts[self.stop - 1])
        part = Tokenized(tokens.ids[held], tokens.supervised[held] & own[: len(tokens)], tokens.text_bytes[held])
        return Piece(part, 0, end - begin)


@dataclasses.dataclass(frozen=True)
class AlignedRows:
    """Pairs of rows of `student_length` and `teacher_length` positions, of documents of two tokenizers."""

    student_length: int
    teacher_length: int
    nothing = AlignedStatistics()

    @property
    def lengths(self) -> tuple[int, int]:
        return self.student_length, self.teacher_length

    def cut(
        self, document: AlignedDocument, *, long_documents: LongDocuments, origin: tuple[int, ...] = ()
    ) -> tuple[list[AlignedPiece], AlignedStatistics]:
        """The pieces of one document, each with room in a pair of rows, and what was done to it.

        "split" keeps every chunk that fits a row together with the chunk before; "truncate" the first piece, "drop"
        nothing of a document that is more than one piece. Pieces without a supervised target of the student are left
        out.
        """
        pieces, long_chunks, start = [], 0, 0
        total = len(document.units[0].lasts)
        while start < total:
            stop = min(
                int(np.searchsorted(units.reach, units.begin(start) + length, side="right"))
                for units, length in zip(document.units, self.lengths, strict=True)
            )
            if stop > start:
                pieces.append(AlignedPiece(document, start, stop, origin))
            else:
                long_chunks += 1
            start = max(stop, start + 1)
            if long_documents != "split":
                break
        counted = {"documents": 1, "long_chunks": long_chunks}
        if start < total or long_chunks or len(pieces) > 1:
            counted[{"split": "split", "truncate": "truncated", "drop": "dropped"}[long_documents]] = 1
            if long_documents == "drop":
                return [], AlignedStatistics(documents=1, dropped=1)
        pieces = [piece for piece in pieces if piece.supervised]
        return pieces, AlignedStatistics(**counted, unsupervised=int(not pieces))

    def piece(self, document: AlignedDocument, start: int, stop: int, origin: tuple[int, ...]) -> AlignedPiece:
        return AlignedPiece(document, start, stop, origin)

    def count(self, row: list[AlignedPiece]) -> AlignedStatistics:
        """The part of the statistics that an emitted pair of rows adds."""
        return AlignedStatistics(
            rows=1,
            tokens=sum(piece.sizes[0] for piece in row),
            supervised=sum(piece.supervised for piece in row),
            positions=self.student_length,
            chunks=sum(piece.chunks for piece in row),
            teacher_tokens=sum(piece.sizes[1] for piece in row),
            teacher_positions=self.teacher_length,
        )

    def arrays(self, rows: Sequence[list[AlignedPiece]]) -> dict[str, Any]:
        """Rows as the fields of the student's `Batch`, [rows, student_length], with "chunks", and under "teacher" the
        same fields of the teacher's, [rows, teacher_length].

        A piece has the same segment id on both sides. chunks: int32, the chunk of the *target* at each position: the
        supervised chunks of a pair of rows are numbered from 1 through all of its segments, 0 is none.
        """
        student, teacher = (
            to_arrays([[piece.sides[side] for piece in row] for row in rows], length)
            | {"chunks": np.zeros((len(rows), length), np.int32)}
            for side, length in enumerate(self.lengths)
        )
        for index, row in enumerate(rows):
            before, at = 0, [0, 0]
            for piece in row:
                for side, (batch, chunks) in enumerate(zip((student, teacher), piece.targets(), strict=True)):
                    stop = at[side] + len(chunks)
                    batch["chunks"][index, at[side] : stop] = np.where(chunks > 0, chunks + before, 0)
                    at[side] = stop
                before += piece.chunks
        return student | {"teacher": teacher}

    def shortened(self, divisor: int) -> AlignedRows:
        return AlignedRows(*(-(-length // divisor) for length in self.lengths))
