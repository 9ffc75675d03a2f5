"""One text in two tokenizations: its chunks side by side, how likely each model finds them, and what likelihood
matching makes of that."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.checkpoint.open import Model
from jaxdistill.data.aligned import AlignedDocument, following_ids
from jaxdistill.data.aligned_rows import AlignedPiece
from jaxdistill.data.packing import Piece
from jaxdistill.evaluate.scoring import Scoring, position_values
from jaxdistill.losses.alm import ALM, EndsChunk, Path
from jaxdistill.losses.terms import CrossEntropy
from jaxdistill.tokenizers import Tokenizer


class Side(NamedTuple):
    """A tokenizer, and the model that reads its tokens, if there is one."""

    tokenizer: Tokenizer
    model: Model | None = None


class Token(NamedTuple):
    """text: what the token contributes to text (`Tokenizer.token_bytes`). log_prob: in nats; None without a model, and
    where nothing precedes the token."""

    id: int
    text: bytes
    log_prob: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """The tokens of a chunk on both sides, or tokens between two chunks that are in none.

    sides: the student's, the teacher's. chunk: its number from 1; 0 is none. compared: whether likelihood matching
    compares the chunk: both models predict all of it. text_bytes: of the original text. group: the place among
    `AlignedView.groups` of the group it is in.
    """

    sides: tuple[tuple[Token, ...], ...]
    chunk: int = 0
    compared: bool = False
    text_bytes: int = 0
    group: int | None = None

    @property
    def nats(self) -> tuple[float | None, float | None]:
        """The log-likelihood of a compared chunk for each side, None without a model."""
        student, teacher = (_sum([token.log_prob for token in side]) if self.compared else None for side in self.sides)
        return student, teacher

    @property
    def difference(self) -> float | None:
        """By how many nats the student finds the chunk likelier than the teacher does."""
        student, teacher = self.nats
        return None if student is None or teacher is None else student - teacher


class Group(NamedTuple):
    """Chunks that are compared as one, from chunk `first` to chunk `last`. student, teacher: log-likelihoods in nats as
    they are compared, with that of a word's end where the term adds it. divergence: the term's."""

    first: int
    last: int
    student: float
    teacher: float
    divergence: float


@dataclasses.dataclass(frozen=True)
class AlignedView:
    """All tokens of both sides in order, and the groups; none unless both sides have a model.

    Pairs of numbers are the student's and the teacher's.
    """

    cells: tuple[Cell, ...]
    groups: tuple[Group, ...] = ()

    @functools.cached_property
    def chunks(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.chunk]

    @functools.cached_property
    def compared(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.compared]

    @property
    def tokens(self) -> list[int]:
        return _counted(self.cells)

    @property
    def unsupervised(self) -> list[int]:
        """Tokens in no chunk that is compared."""
        return [count - compared for count, compared in zip(self.tokens, _counted(self.compared), strict=True)]

    @property
    def one_to_one(self) -> float:
        """The share of chunks that are one token on both sides."""
        return _mean([all(len(side) == 1 for side in cell.sides) for cell in self.chunks])

    @property
    def bytes_per_chunk(self) -> float:
        return _mean([cell.text_bytes for cell in self.chunks])

    @property
    def nats(self) -> list[float | None]:
        """The log-likelihood of all compared chunks."""
        return [_sum(side) for side in zip(*(cell.nats for cell in self.compared), strict=True)] or [None, None]

    @property
    def bits_per_byte(self) -> list[float | None]:
        """Of the compared chunks: the same bytes on both sides."""
        size = sum(cell.text_bytes for cell in self.compared) * math.log(2)
        return [None if nats is None or not size else -nats / size for nats in self.nats]

    @property
    def divergence(self) -> float | None:
        """The mean over groups, None without any."""
        return _mean([group.divergence for group in self.groups]) if self.groups else None


def aligned_view(
    document: AlignedDocument, student: Side, teacher: Side, *, term: ALM, scoring: Scoring = Scoring()
) -> AlignedView:
    """What there is to see of a document. term: what joins chunks and compares them.

    Raises ValueError for a document that is longer than a model's context or has ids that it lacks.
    """
    sides = (student, teacher)
    piece = AlignedPiece(document, 0, len(document.units[0].lasts))
    paths = [
        None if side.model is None else _path(name, side, side.model, predicted, chunks, term, scoring)
        for name, side, predicted, chunks in zip(
            ("student", "teacher"), sides, piece.sides, piece.targets(), strict=True
        )
    ]
    tokens = [
        _tokens(side.tokenizer, ids.ids, path)
        for side, (ids, _), path in zip(sides, document.sides, paths, strict=True)
    ]
    groups = _groups(term, *paths, numbers=np.flatnonzero(document.supervised) + 1)
    return AlignedView(_cells(document, tokens, groups), groups)


def _path(name: str, side: Side, model: Model, piece: Piece, chunks: np.ndarray, term: ALM, scoring: Scoring) -> Path:
    """The model's account of its own tokens; each field [1, positions]."""
    ids = following_ids(side.tokenizer, term.white_space)
    values = position_values(name, model, piece, {"nats": CrossEntropy(), "ends": EndsChunk(ids=ids)}, scoring=scoring)
    fields = (-values["nats"], values["ends"], chunks, np.ones_like(chunks))
    return Path(*(jnp.asarray(field)[None] for field in fields))


def _tokens(tokenizer: Tokenizer, ids: np.ndarray, path: Path | None) -> list[Token]:
    vocabulary = tokenizer.token_bytes()
    log_probs = [None] * len(ids) if path is None else [None, *path.log_probs[0].tolist()]
    return [Token(int(i), vocabulary[i], log_prob) for i, log_prob in zip(ids, log_probs, strict=True)]


def _groups(term: ALM, student: Path | None, teacher: Path | None, *, numbers: np.ndarray) -> tuple[Group, ...]:
    """numbers: of the chunks that are compared."""
    if student is None or teacher is None or not len(numbers):
        return ()
    found = jax.device_get(term.compare(student, teacher))
    members = [numbers[found.group[0, : len(numbers)] == group] for group in np.flatnonzero(found.groups[0])]
    values = zip(found.student[0], found.teacher[0], found.divergence[0], strict=True)
    return tuple(
        Group(int(chunks[0]), int(chunks[-1]), *map(float, each)) for chunks, each in zip(members, values, strict=False)
    )


def _cells(document: AlignedDocument, tokens: Sequence[list[Token]], groups: Sequence[Group]) -> tuple[Cell, ...]:
    group_of = {chunk: index for index, each in enumerate(groups) for chunk in range(each.first, each.last + 1)}
    cells, starts = [], (0, 0)

    def taken(starts: Sequence[int], stops: Sequence[int]) -> tuple[tuple[Token, ...], ...]:
        return tuple(tuple(side[start:stop]) for side, start, stop in zip(tokens, starts, stops, strict=True))

    for unit, stops in enumerate(zip(*(units.lasts + 1 for units in document.units), strict=True)):
        chunk = unit + 1 if unit < len(document.supervised) else 0
        firsts = tuple(units.firsts[unit] for units in document.units) if chunk else stops
        if firsts != starts:
            cells.append(Cell(sides=taken(starts, firsts)))
        if chunk:
            compared = bool(document.supervised[unit])
            size = int(document.student.text_bytes[firsts[0] : stops[0]].sum())
            group = group_of.get(chunk)
            cells.append(Cell(sides=taken(firsts, stops), chunk=chunk, compared=compared, text_bytes=size, group=group))
        starts = stops
    return tuple(cells)


def _sum(values: Sequence[float | None]) -> float | None:
    """None if any is."""
    known = [value for value in values if value is not None]
    return math.fsum(known) if len(known) == len(values) else None


def _counted(cells: Sequence[Cell]) -> list[int]:
    return [sum(len(cell.sides[side]) for cell in cells) for side in (0, 1)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
